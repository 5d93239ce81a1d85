// Arrow keys go to the page or record before and after; "/" goes to the search. Everything works without them.
"use strict";
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const typing = event.target.matches("input, select, textarea, [tabindex='0']");
  if (event.key === "/" && !typing) {
    const field = document.querySelector("input[type=search]");
    if (field) { event.preventDefault(); field.focus(); }
  }
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && !typing && document.querySelector(`a[rel=${rel}]`);
  if (link) { event.preventDefault(); link.click(); }
});
