// The picture of the same box under the pointer: where it is dragged to, in fractions of its size.

function attach(model, picture) {
  const tell = (event) => {
    const box = picture.getBoundingClientRect();
    model.set("place", [
      (event.clientX - box.left) / box.width,
      (event.clientY - box.top) / box.height,
    ]);
    model.save_changes();
  };
  const press = (event) => {
    event.preventDefault();
    picture.setPointerCapture(event.pointerId);
    tell(event);
  };
  const move = (event) => {
    if (picture.hasPointerCapture(event.pointerId)) tell(event);
  };
  picture.style.cursor = "grab";
  picture.style.touchAction = "none";
  picture.draggable = false;
  picture.addEventListener("pointerdown", press);
  picture.addEventListener("pointermove", move);
  return () => {
    picture.removeEventListener("pointerdown", press);
    picture.removeEventListener("pointermove", move);
  };
}

function render({ model, el }) {
  let detach = () => {};
  let waiting = 0;

  // the picture may come into the page after this element
  const seek = () => {
    const picture = el.closest(".dpo-lab-drag")?.querySelector("img.dpo-lab-picture");
    if (picture) detach = attach(model, picture);
    else waiting = requestAnimationFrame(seek);
  };
  seek();
  return () => {
    cancelAnimationFrame(waiting);
    detach();
  };
}

export default { render };
