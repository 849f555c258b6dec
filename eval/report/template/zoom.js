const zoom = document.querySelector("dialog");
const shown = zoom.querySelector("img");
const thumbs = [...document.querySelectorAll("button.thumb")];
let place = 0;
const show = (to) => {
  place = (to + thumbs.length) % thumbs.length;
  const image = thumbs[place].querySelector("img");
  shown.src = image.src;
  shown.alt = image.alt;
  zoom.querySelector("p").textContent = thumbs[place].dataset.title;
};
thumbs.forEach((thumb, index) => thumb.addEventListener("click", () => { show(index); zoom.showModal(); }));
zoom.addEventListener("click", (event) => { if (event.target !== shown) zoom.close(); });
zoom.addEventListener("close", () => thumbs[place].focus());
zoom.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") show(place + 1);
  if (event.key === "ArrowLeft") show(place - 1);
});
