"use strict";
// Tables are sorted by a click on a title, and filtered by words; both read what the page shows.
const SCALE = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 };
const order = new Intl.Collator("en", { numeric: true });
const text = (row, at) => (row.cells[at]?.textContent ?? "").trim();
function value(shown) {
  const found = /^×?(-?(?:inf|[\d,.]+(?:e[+-]?\d+)?))(?:\s([kMGTPE])?B)?$/.exec(shown);
  if (!found) return -Infinity;
  const figure = found[1].replaceAll(",", "").replace("inf", "Infinity");
  return parseFloat(figure) * (SCALE[found[2]] ?? 1);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], titles = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  titles.forEach((title, at) => {
    const numeric = table.classList.contains("n" + (at + 1));
    const sort = () => {
      const now = title.ariaSort === (numeric ? "descending" : "ascending");
      titles.forEach((other) => other.setAttribute("aria-sort", "none"));
      title.setAttribute("aria-sort", numeric !== now ? "descending" : "ascending");
      const sign = title.ariaSort === "ascending" ? 1 : -1;
      const keyed = rows.map((row) => [numeric ? value(text(row, at)) : text(row, at), row]);
      keyed.sort((a, b) => sign * (numeric ? (a[0] > b[0]) - (a[0] < b[0]) : order.compare(a[0], b[0])));
      body.append(...keyed.map((pair) => pair[1]));
    };
    title.setAttribute("aria-sort", "none");
    title.tabIndex = 0;
    title.addEventListener("click", sort);
    title.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
  if (rows.length < 12) continue;
  const bar = document.createElement("div"), input = document.createElement("input"), shown = document.createElement("output");
  bar.className = "filter";
  input.type = "search";
  input.placeholder = "Filter: words, all must match";
  input.setAttribute("aria-label", input.placeholder);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const line = words.length ? row.textContent.toLowerCase() : "";
      row.hidden = !words.every((word) => line.includes(word));
      count += !row.hidden;
    }
    shown.textContent = words.length ? `${count} of ${rows.length}` : `${rows.length} rows`;
  };
  input.addEventListener("input", filter);
  filter();
  bar.append(input, shown);
  table.parentElement.before(bar);
}
