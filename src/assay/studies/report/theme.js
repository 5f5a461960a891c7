(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");
  try {
    const kept = localStorage.getItem("assay-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch (error) { /* storage may be forbidden; the system's theme it is */ }
})();
