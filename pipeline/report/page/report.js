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
  tip.textContent = point.dataset.tip;
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

// Prediction: the formulas of pipeline/report/prediction.py, for a bandwidth and a round-trip time of the reader's.
const sum = (values) => values.reduce((total, value) => total + value, 0);

function predictPrefill(costs, bitsPerS, rttS) {
  const terms = { ...costs.node_s };
  for (const [name, nbytes] of Object.entries(costs.link_bytes)) terms[name] = (8 * nbytes) / bitsPerS;
  const waitS = (costs.num_hops * rttS) / 2 / costs.microbatch_tokens;
  terms["in flight"] = (sum(Object.values(terms)) + waitS) / costs.in_flight;
  const binds = Object.keys(terms).reduce((a, b) => (terms[b] > terms[a] ? b : a));
  return { value: 1 / terms[binds], binds };
}

function predictDecode(costs, bitsPerS, rttS) {
  if (!costs.one_token) return null;
  const parts = {
    compute: costs.one_token.seconds,
    bandwidth: (8 * costs.one_token.nbytes) / bitsPerS,
    "round trips": (costs.num_hops * rttS) / 2,
  };
  const binds = Object.keys(parts).reduce((a, b) => (parts[b] > parts[a] ? b : a));
  return { value: 1e3 * sum(Object.values(parts)), binds };
}

const significant = (value) =>
  Number(value.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 10 });

const form = document.getElementById("network");
if (form) {
  const points = JSON.parse(document.getElementById("costs").textContent);
  const rows = new Map([...document.querySelectorAll("#own-link tbody tr")].map((row) => [row.dataset.point, row]));
  const fill = (cell, predicted) => {
    cell.dataset.value = predicted ? predicted.value : "";
    cell.textContent = predicted ? significant(predicted.value) : "–";
    cell.nextElementSibling.textContent = cell.nextElementSibling.dataset.value = predicted ? predicted.binds : "";
  };
  const update = () => {
    const mbits = Number(form.elements.bandwidth.value), rttMs = Number(form.elements.rtt.value);
    const valid = mbits > 0 && rttMs >= 0 && Number.isFinite(mbits) && Number.isFinite(rttMs);
    form.elements.problem.value = valid ? "" : "bandwidth must be above 0, the round trip 0 or more";
    if (!valid) return;
    points.forEach((costs, index) => {
      const [, , prefill, , decode] = rows.get(String(index)).cells;
      fill(prefill, predictPrefill(costs, mbits * 1e6, rttMs / 1e3));
      fill(decode, predictDecode(costs, mbits * 1e6, rttMs / 1e3));
    });
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
}
