// Applies the stored theme. This runs before the first paint, so that the page does not flash.
try {
  const theme = JSON.parse(localStorage.getItem("lamoe:prefs"))?.theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // without a readable setting the system's theme applies
}
