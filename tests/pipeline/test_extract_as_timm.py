"""Features in a store are those that timm computes with its own evaluation transform and model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import _registry, get_pretrained_cfg

from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import open_source
from sfm.stats_store.store import open_store


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_features_and_exemplars_match_the_timm_transform_and_model(
    mode: str, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(get_pretrained_cfg("test_vit"), crop_mode=mode, crop_pct=0.9, input_size=(3, 32, 32))
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "test_vit", config)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for file in image_folder.rglob("*.png"):
        Image.open(file).convert("RGB").resize((71, 30)).save(file)

    found = extract(
        ExtractConfig(
            source=f"folder:{image_folder}",
            store=str(tmp_path / "store"),
            backbone=[f"timm/test_vit@{tmp_path / 'w.safetensors'}"],
            sub_classes=(2,),
            exemplars=2,
            views=1,
        )
    )

    entry = open_store(str(tmp_path / "store")).open_entry(found.published[0].summary)
    assert entry.backbone.preprocessing.crop_mode == mode
    source = open_source(f"folder:{image_folder}")
    settings = resolve_data_config(pretrained_cfg=config.to_dict())
    transform, pixels = create_transform(**settings), create_transform(**settings, normalize=False)
    images = torch.stack([transform(source.decode(s.data)) for s in source.test.read(np.arange(24))])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(
        torch.from_numpy(entry.open_array("test/feature")[:]).float(), expected, atol=2e-3, rtol=2e-3
    )
    sample = int(entry.open_array("exemplar/sample")[0, 0])
    (exemplar,) = source.train.read(np.array([sample]))
    np.testing.assert_array_equal(
        entry.open_array("exemplar/image")[0, 0],
        pixels(source.decode(exemplar.data)).permute(1, 2, 0).numpy(),
    )
