// Runs before the first paint, so that a chosen theme does not flash.
"use strict";
try {
  const theme = localStorage.getItem("recsys2stage.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is blocked: the system's theme it is.
}
