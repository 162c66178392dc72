"use strict";
(() => {
  const make = (name, within, before) => within.insertBefore(document.createElement(name), before ?? null);

  // One heatmap at a time, and what the pointer is on in a line below the choice.
  for (const group of document.querySelectorAll(".switch")) {
    const figures = [...group.querySelectorAll("figure")];
    const controls = make("div", group, group.firstChild);
    controls.className = "controls";
    if (figures.length > 1) {
      const label = make("label", controls);
      label.textContent = "Figure: ";
      const select = make("select", label);
      for (const figure of figures) make("option", select).textContent = figure.dataset.title;
      const show = () => figures.forEach((figure, at) => { figure.hidden = at !== select.selectedIndex; });
      select.addEventListener("change", show);
      show();
    }
    const output = make("output", controls);
    group.addEventListener("pointerover", (event) => {
      const title = event.target.querySelector?.(":scope > title");
      if (title) output.textContent = title.textContent;
    });
  }

  // Numbers as they are written: "26.1 %", "51.8 k", "1,024", "n/a" last.
  const scales = { k: 1e3, M: 1e6, B: 1e9, T: 1e12 };
  const value = (text) => {
    const match = /^([-+]?[\d.,]+(?:e[-+]?\d+)?)(?:\s?([kMBT%]))?/.exec(text);
    return match ? Number(match[1].replaceAll(",", "")) * (scales[match[2]] ?? 1) : NaN;
  };
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (isNaN(x) && isNaN(y)) return a.localeCompare(b, "en", { numeric: true });
    return isNaN(x) - isNaN(y) || x - y;
  };
  for (const table of document.querySelectorAll("table[id]")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      head.setAttribute("aria-sort", "none");
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const known = (row) => row.cells[at].textContent !== "n/a" && row.cells[at].textContent !== "";
        const sorted = rows.filter(known).sort((a, b) => compare(a.cells[at].textContent, b.cells[at].textContent));
        if (down) sorted.reverse();
        body.append(...sorted, ...rows.filter((row) => !known(row)));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
    const box = table.parentElement;
    const controls = make("div", box.parentElement, box);
    controls.className = "controls";
    const label = make("label", controls);
    label.textContent = "Filter: ";
    const input = make("input", label);
    input.type = "search";
    const count = make("span", controls);
    const filter = () => {
      const wanted = input.value.toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      count.textContent = ` ${shown} of ${rows.length}`;
    };
    input.addEventListener("input", filter);
    filter();
  }
})();
