"use strict";
// Only the current sample is in the document. Token text reaches the page as text nodes, never as markup.

const { samples } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

let shown = []; // indices into samples that pass the filter
let at = 0; // position in shown
let only = null; // index of the counterfactual that the pruned lane shows, null = all of them
let focused = 0; // the one token that Tab reaches; arrows move it

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Tokens show their whitespace; an empty one is part of a character that the token before shows.
function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "·" };
  return (text ? text.split(/([ \n\t\r])/).filter((part) => part) : [""]).map((part) =>
    part in signs ? make("span", "space", signs[part]) : part
  );
}

const fixed = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const plain = (value) => (value === null ? "–" : value === 0 ? "0" : Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(4));
const words = (slug) => slug.replaceAll("_", " ");
const fate = (cf) => (cf.verified === true ? "kept" : cf.verified === false ? "dropped" : "not verified");
const removals = (sample, token) => sample.counterfactuals.filter((cf, i) => (only === null || i === only) && cf.tokens.includes(token));

function render() {
  const sample = samples[shown[at]];
  hideTip();
  byId("place").textContent = shown.length ? `${at + 1} of ${shown.length}` : "none";
  byId("previous").disabled = at === 0;
  byId("next").disabled = at >= shown.length - 1;
  if (!sample) return byId("sample").replaceChildren(make("p", "empty", samples.length ? "No sample passes this filter." : "No samples."));
  const parts = [about(sample)];
  if (sample.status === "ok") {
    parts.push(heatMap(sample));
    if (sample.counterfactuals.length) parts.push(counterfactuals(sample));
    const response = make("details", "response", make("summary", "", "response"), make("pre", "text", sample.response));
    response.open = true;
    parts.push(response);
  } else if (sample.text) {
    parts.push(make("pre", "text", sample.text));
  }
  byId("sample").replaceChildren(...parts);
  placeLanes();
}

function about(sample) {
  const facts = [make("b", "", sample.id)];
  if (sample.level === "response") facts.push(`response level, cut ${sample.cut}`);
  if (sample.status === "ok") {
    const scored = sample.score.filter((score) => score !== null).length;
    const deleted = new Set(sample.counterfactuals.flatMap((cf) => cf.tokens)).size;
    facts.push(`${sample.tokens.length} prompt tokens, ${scored} scored, ${deleted} deleted`);
    facts.push(`loss: teacher ${fixed(sample.loss[0])}, student ${fixed(sample.loss[1])}`);
  } else {
    facts.push(`skipped: ${words(sample.reason ?? "no reason given")}`);
  }
  return make("p", "about", ...facts.map((fact) => (typeof fact === "string" ? make("span", "", fact) : fact)));
}

function counterfactuals(sample) {
  const box = make("div", "cuts");
  sample.counterfactuals.forEach((cf, i) => {
    const button = make("button", cf.verified === false ? "is-dropped" : "", `${i + 1} `);
    cf.removed.forEach((text, k) => button.append(k ? " … " : "", make("q", "", ...visible(text))));
    button.append(` ${cf.mode}, ${fate(cf)}${cf.reason ? ": " + words(cf.reason) : ""}`);
    button.title = "show only this deletion in the pruned lane";
    button.setAttribute("aria-pressed", only === i);
    button.addEventListener("click", () => {
      only = only === i ? null : i;
      render();
      byId("sample").querySelectorAll(".cuts button")[i].focus();
    });
    box.append(button);
  });
  return box;
}

function heatMap(sample) {
  const map = make("div", "map");
  map.setAttribute("role", "group");
  map.setAttribute("aria-label", "tokens of the prompt with their scores");
  focused = Math.min(focused, sample.tokens.length - 1);
  sample.tokens.forEach((text, i) => {
    const token = make("span", "token", make("span", "word", ...visible(text)));
    for (const [lane, value] of [["norm", sample.teacher[i]], ["norm", sample.student[i]], ["difference", 1 - sample.score[i]], ["pruned", 0]]) {
      const cell = make("i", lane);
      cell.style.setProperty("--value", value ?? 0);
      token.append(cell);
    }
    const removing = removals(sample, i);
    if (sample.score[i] === null) token.classList.add("unscored");
    if (removing.length) token.classList.add(removing.every((cf) => cf.verified === false) ? "dropped" : "kept");
    token.dataset.index = i;
    token.tabIndex = i === focused ? 0 : -1;
    map.append(token);
    if (text.includes("\n")) map.append(make("br"));
  });
  return map;
}

// The map wraps where the window says; the names of the lanes are repeated beside each of its lines.
function placeLanes() {
  document.querySelectorAll(".lanes").forEach((old) => old.remove());
  const tops = new Set([...document.querySelectorAll(".token:not(.unscored)")].map((token) => token.offsetTop));
  for (const top of tops) {
    const lanes = make("div", "lanes", ...["teacher", "student", "D", "pruned"].map((name) => make("span", "", name)));
    lanes.style.top = `${top}px`;
    lanes.ariaHidden = "true";
    document.querySelector(".map").append(lanes);
  }
}

function showTip(token) {
  const sample = samples[shown[at]];
  const i = Number(token.dataset.index);
  const tip = byId("tip");
  const head = make("p", "", make("code", "", ...visible(sample.tokens[i])), ` ${sample.ids ? `token ${i}, id ${sample.ids[i]}` : `text unit ${i}`}`);
  if (sample.score[i] === null) {
    tip.replaceChildren(head, make("p", "quiet", "not scored"));
  } else {
    const row = (tag, ...cells) => make("tr", "", ...cells.map((cell) => make(tag, "", cell)));
    const lower = sample.score.filter((score) => score !== null && score < sample.score[i]).length;
    const scored = sample.score.filter((score) => score !== null).length;
    tip.replaceChildren(
      head,
      make(
        "table",
        "",
        row("th", "", "norm", "ĝ"),
        row("td", "teacher", plain(sample.teacher_norm[i]), fixed(sample.teacher[i])),
        row("td", "student", plain(sample.student_norm[i]), fixed(sample.student[i]))
      ),
      make("p", "", make("b", "", `D ${fixed(sample.score[i])}`), `, rank ${lower + 1} of ${scored} from below`)
    );
  }
  const removing = removals(sample, i);
  for (const cf of removing) {
    tip.append(make("p", "", `deleted in ${sample.counterfactuals.indexOf(cf) + 1} (${fate(cf)}): `, ...cf.removed.flatMap((text, k) => [k ? " … " : "", make("q", "", ...visible(text))])));
  }
  if (!removing.length) tip.append(make("p", "quiet", "not deleted"));
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  const below = box.bottom + tip.offsetHeight + 6 < innerHeight;
  tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6))}px`;
  tip.style.top = `${below ? box.bottom + 2 : Math.max(6, box.top - tip.offsetHeight - 2)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function go(position) {
  at = Math.max(0, Math.min(position, shown.length - 1));
  only = null;
  focused = 0;
  render();
}

// report.html#sample=17 opens the 17th sample
function fromAddress() {
  const number = Number(location.hash.match(/^#sample=(\d+)$/)?.[1]);
  if (number && samples[number - 1]) show(number - 1);
}

function show(index) {
  if (!shown.includes(index)) {
    byId("filter").value = "all";
    filter();
  }
  go(shown.indexOf(index));
}

function filter() {
  const passes = {
    all: () => true,
    pruned: (sample) => sample.counterfactuals?.length > 0,
    unpruned: (sample) => sample.counterfactuals?.length === 0,
    skipped: (sample) => sample.status !== "ok",
  }[byId("filter").value];
  shown = samples.flatMap((sample, i) => (passes(sample) ? [i] : []));
  go(0);
}

// The next sample with this id, else the next that holds the text; a hit that the filter hides lifts the filter.
function find() {
  const query = byId("find").value.trim().toLowerCase();
  const order = samples.map((_, k) => (k + (shown[at] ?? 0) + 1) % samples.length);
  const holds = (k) => ((samples[k].tokens?.join("") ?? samples[k].text ?? "") + (samples[k].response ?? "")).toLowerCase().includes(query);
  const hit = order.find((k) => samples[k].id.toLowerCase() === query) ?? order.find(holds);
  byId("found").textContent = query && hit === undefined ? "not found" : "";
  if (query && hit !== undefined) show(hit);
}

function moveFocus(from, step) {
  const tokens = [...document.querySelectorAll(".token")];
  const next = tokens[from + step];
  if (!next) return;
  tokens[from].tabIndex = -1;
  focused = from + step;
  next.tabIndex = 0;
  next.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const token = event.target.closest?.(".token");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") {
    hideTip();
    token?.blur();
  } else if (event.key === "/") {
    byId("find").focus();
  } else if (step && token) {
    moveFocus(Number(token.dataset.index), step);
  } else if (step) {
    go(at + step);
  } else {
    return;
  }
  event.preventDefault();
});
byId("sample").addEventListener("mouseover", (event) => {
  const token = event.target.closest(".token");
  if (token) showTip(token);
  else hideTip();
});
byId("sample").addEventListener("mouseleave", hideTip);
byId("sample").addEventListener("focusin", (event) => event.target.closest(".token") && showTip(event.target.closest(".token")));
byId("sample").addEventListener("focusout", hideTip);
addEventListener("scroll", () => (document.activeElement?.matches(".token") ? showTip(document.activeElement) : hideTip()), { passive: true });
byId("previous").addEventListener("click", () => go(at - 1));
byId("next").addEventListener("click", () => go(at + 1));
byId("filter").addEventListener("change", filter);
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  find();
});
byId("ids").append(...samples.map((sample) => Object.assign(make("option"), { value: sample.id })));
new ResizeObserver(placeLanes).observe(byId("sample"));
filter();
addEventListener("hashchange", fromAddress);
fromAddress();
