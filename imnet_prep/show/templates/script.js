// Without this script all items of a list are shown; with it they can be searched, and come in pages.
"use strict";
for (const box of document.querySelectorAll("[data-filter]")) {
  const field = box.querySelector("input");
  const count = box.querySelector("[aria-live]");
  const [before, after] = box.querySelectorAll(".pager button");
  const items = [...document.querySelectorAll(box.dataset.filter)];
  const size = Number(box.dataset.page) / (window.innerWidth < 640 ? 2 : 1);
  let first = 0;
  box.hidden = false;
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = items.filter((item) => words.every((word) => item.dataset.text.includes(word)));
    const shown = new Set(found.slice(first, first + size));
    for (const item of items) item.hidden = !shown.has(item);
    before.disabled = first === 0;
    after.disabled = first + size >= found.length;
    before.hidden = after.hidden = found.length <= size;
    const range = found.length > size ? `${first + 1} to ${first + shown.size} of ${found.length}` : `${found.length}`;
    count.textContent = words.length ? `${range} found, ${items.length} in all` : `${range} in all`;
  };
  const turn = (step) => { first += step; show(); };
  before.addEventListener("click", () => turn(-size));
  after.addEventListener("click", () => turn(size));
  field.addEventListener("input", () => turn(-first));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { field.value = ""; turn(-first); }
  });
  show();
}
