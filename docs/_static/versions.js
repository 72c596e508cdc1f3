// Makes the version in the sidebar a list of the versions in ../versions.js. Each leads to the same page, where that
// version has it, else to its front page. Without ../versions.js the version stays text.
if (typeof siteVersions !== "undefined") {
  const place = document.querySelector(".site-version");
  const {version, page} = place.dataset;
  const root = new URL("../", new URL(document.documentElement.dataset.content_root, location.href));
  const list = document.createElement("select");
  list.setAttribute("aria-label", "version of this documentation");
  for (const row of siteVersions) {
    const label = row.version + (row.names.length ? ` (${row.names.join(", ")})` : "");
    const target = new URL(`${row.version}/${row.pages.includes(page) ? page : "index.html"}`, root);
    list.add(new Option(label, target.href, false, row.version === version));
  }
  list.addEventListener("change", () => { location.href = list.value; });
  place.replaceChildren("version ", list);
}
