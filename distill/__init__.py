"""The distillation stage: class statistics -> synthetic images."""
