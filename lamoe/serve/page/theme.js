// Runs before the first paint: the theme that was chosen, if one was.
try {
  const theme = JSON.parse(localStorage.getItem("lamoe:prefs"))?.theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* the system's theme */ }
