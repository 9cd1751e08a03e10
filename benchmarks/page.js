"use strict";
// Tables: a click on a header sorts by its column, a second one the other way round; no value comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const sign = down ? -1 : 1;
      const numeric = head.classList.contains("num");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
// The legend: a click hides a method in all pictures, a pointer or focus on it makes the others faint.
const series = [...document.querySelectorAll(".series")];
for (const button of document.querySelectorAll(".legend button[data-method]")) {
  const own = series.filter((group) => group.dataset.method === button.dataset.method);
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    own.forEach((group) => group.toggleAttribute("hidden", !shown));
  });
  const faint = (on) => series.forEach((group) => group.classList.toggle("faint", on && !own.includes(group)));
  for (const [name, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
    button.addEventListener(name, () => faint(on));
  }
}
