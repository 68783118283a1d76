"use strict";
// Searches, filters and sorts the table of subjects, and moves in it by keys.
(() => {
  const table = document.getElementById("table");
  const bodies = [...table.tBodies];
  const size = bodies.length ? bodies[0].rows.length : 0;
  const initial = bodies.flatMap((body) => [...body.rows]);
  const texts = new Map(initial.map((row) => [row, row.textContent.toLowerCase()]));
  const heads = [...table.tHead.rows[0].cells];
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const none = document.getElementById("none");
  const ORDER = 2; // the column whose order is the page's own: failed, flagged, the others
  let rows = initial;
  let current = null;

  const kind = () => document.querySelector("input[name=show]:checked").value;

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = kind();
    let visible = 0;
    for (const row of initial) {
      const text = texts.get(row);
      const is = (shown === "all" || row.dataset.is === shown) && words.every((word) => text.includes(word));
      row.hidden = !is;
      visible += is;
    }
    count.value = `${visible} of ${initial.length}`;
    none.hidden = visible > 0;
  }

  function sort(column, descending) {
    heads.forEach((head, n) => {
      if (n === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    rows = [...initial];
    if (column !== ORDER) {
      const numeric = heads[column].classList.contains("number");
      const keys = new Map(rows.map((row) => {
        const text = row.cells[column].textContent.trim();
        if (!numeric) return [row, row.cells[column].firstChild.textContent.trim()];
        return [row, text === "inf" ? Infinity : text === "-inf" ? -Infinity : parseFloat(text)];
      }));
      const compare = numeric ? (a, b) => a - b : new Intl.Collator(undefined, { numeric: true }).compare;
      const sign = descending ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (numeric && (Number.isNaN(x) || Number.isNaN(y))) return Number.isNaN(x) - Number.isNaN(y); // last
        return x === y ? 0 : sign * compare(x, y);
      });
    } else if (descending) {
      rows.reverse();
    }
    // Dealt out anew, so that every part of the table stays small.
    bodies.forEach((body, n) => body.replaceChildren(...rows.slice(n * size, (n + 1) * size)));
  }

  function show(row) {
    if (current) {
      current.classList.remove("current");
      current.removeAttribute("tabindex");
    }
    current = row;
    row.classList.add("current");
    row.tabIndex = 0;
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }

  function move(step) {
    const visible = rows.filter((row) => !row.hidden);
    if (!visible.length) return;
    const at = current && !current.hidden ? visible.indexOf(current) + step : 0;
    show(visible[Math.max(0, Math.min(visible.length - 1, at))]);
  }

  function reset() {
    search.value = "";
    document.querySelector("input[name=show][value=all]").checked = true;
    filter();
  }

  heads.forEach((head, n) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(n, head.getAttribute("aria-sort") === "ascending"));
  });
  search.addEventListener("input", filter);
  for (const radio of document.querySelectorAll("input[name=show]")) radio.addEventListener("change", filter);
  document.getElementById("reset").addEventListener("click", reset);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target instanceof HTMLInputElement;
    if (event.key === "Escape") {
      reset();
      search.blur();
    } else if (typing && event.target.type === "search") {
      if (event.key === "Enter") move(0);
    } else if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key === "j" || event.key === "k") {
      move(event.key === "j" ? 1 : -1);
    } else if (event.key === "Enter" && event.target === current) {
      const link = current.querySelector("a.view");
      if (link) link.click();
    }
  });
  // A link to a row, such as an outlier's dot, must not lead to one that is filtered out.
  window.addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row && row.hidden) {
      reset();
      row.scrollIntoView();
    }
  });
})();
