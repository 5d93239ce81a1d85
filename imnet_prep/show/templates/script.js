// Without this script all classes are shown; with it they can be searched.
"use strict";
for (const box of document.querySelectorAll("[data-filter]")) {
  const field = box.querySelector("input");
  const count = box.querySelector("[aria-live]");
  const items = [...document.querySelectorAll(box.dataset.filter)];
  box.hidden = false;
  const apply = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const fits = words.every((word) => item.dataset.text.includes(word));
      item.hidden = !fits;
      shown += fits;
    }
    count.textContent = words.length ? `${shown} of ${items.length}` : `${items.length} in all`;
  };
  field.addEventListener("input", apply);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { field.value = ""; apply(); }
  });
  apply();
}
