"use strict";

// Tables: a click on a heading sorts by it, a second one turns the order around. Missing values stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const key = (row) => row.cells[column].dataset.value;
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = heading.dataset.kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
        return descending ? -order : order;
      });
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}

// Charts: the pointer, a tap or the keyboard on a point shows its figures.
const tip = document.getElementById("tip");
const show = (point) => {
  tip.textContent = point.getAttribute("aria-label");
  tip.hidden = false;
  const at = point.querySelector(".mark").getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${window.scrollX + Math.max(8, left)}px`;
  tip.style.top = `${window.scrollY + at.bottom + 8}px`;
};
for (const point of document.querySelectorAll(".point")) {
  for (const event of ["pointerenter", "focus", "click"]) point.addEventListener(event, () => show(point));
  for (const event of ["pointerleave", "blur"]) point.addEventListener(event, () => { tip.hidden = true; });
}

// Prediction: the terms of pipeline/report/prediction.py, embedded in the page, for a network of the reader's. A term is
// linear in what the network costs; prefill takes as long as the largest one, decoding as all together. `way` of a link
// is its bits per second, or null for as fast as the machine, and the seconds from one end to the other.
function evaluate(terms, way) {
  const sum = (costs, each) => Object.entries(costs).reduce((total, [link, cost]) => total + each(cost, way(link)), 0);
  const seconds = terms.map((term) => term.seconds
    + sum(term.bits, (bits, [bitsPerS]) => (bitsPerS === null ? 0 : bits / bitsPerS))
    + sum(term.hops, (hops, [, delayS]) => hops * delayS));
  const longest = Math.max(...seconds);
  const total = seconds.reduce((sum, value) => sum + value, 0);
  return { longest, total, binds: terms[seconds.indexOf(longest)].name };
}

// As `significant` in pipeline/report/columns.py writes it.
function significant(value) {
  if (!Number.isFinite(value)) return "not finite";
  const rounded = Number(value.toPrecision(3)), size = Math.abs(rounded);
  if (rounded === 0 || (size >= 1e-4 && size < 1e15))
    return rounded.toLocaleString("en-US", { maximumFractionDigits: 10 });
  const [digits, exponent] = rounded.toExponential(2).split("e");
  return `${digits}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
}

const form = document.getElementById("network");
if (form) {
  const points = JSON.parse(document.getElementById("costs").textContent);
  const rows = new Map([...document.querySelectorAll("#own-link tbody tr")].map((row) => [row.dataset.point, row]));
  const networks = JSON.parse(document.getElementById("networks")?.textContent ?? "[]");
  const chosen = form.elements.network;
  const fill = (cell, value, binds) => {
    cell.dataset.value = value ?? "";
    cell.textContent = value === null ? "–" : significant(value);
    cell.nextElementSibling.textContent = cell.nextElementSibling.dataset.value = binds;
  };
  const update = () => {
    const mbits = Number(form.elements.bandwidth.value), rttMs = Number(form.elements.rtt.value);
    const valid = mbits > 0 && rttMs >= 0 && Number.isFinite(mbits) && Number.isFinite(rttMs);
    const links = chosen?.value ? networks[chosen.value] : null;
    form.elements.bandwidth.disabled = form.elements.rtt.disabled = links !== null;
    form.elements.problem.value = valid || links ? "" : "bandwidth must be above 0, the round trip 0 or more";
    if (!valid && !links) return;
    const way = links ? (link) => links[link] : () => [mbits * 1e6, rttMs / 2e3];
    points.forEach((terms, index) => {
      const [, , prefillCell, , decodeCell] = rows.get(String(index)).cells;
      const missing = terms.prefill.some((term) => Object.keys(term.hops).some((link) => !way(link)));
      if (missing) { // a point with other links than this network
        fill(prefillCell, null, "");
        if (terms.decode.length) fill(decodeCell, null, "");
        return;
      }
      const prefill = evaluate(terms.prefill, way);
      fill(prefillCell, 1 / prefill.longest, prefill.binds);
      if (terms.decode.length === 0) return; // not measured
      const decode = evaluate(terms.decode, way);
      fill(decodeCell, 1e3 * decode.total, decode.binds);
    });
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
}
