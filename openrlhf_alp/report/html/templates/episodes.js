"use strict";
// Everything of an episode is untrusted and reaches the page by textContent only.
const $ = (id) => document.getElementById(id);
const NOTHING = -32768, UNIT = 1000;
const PROMPT = 0, ACTION = 1;
let data, tokens, columns;
const state = { mode: 0, group: 0, side: "groups", worst: -1, needle: "", found: [] };

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Control characters and lone surrogates become visible signs, and directional ones cannot reorder what stands beside them.
const DIRECTIONAL = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (char) => String.fromCharCode(0x2400 + char.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421")
    .replace(/[\u0080-\u009f]/g, (char) => `\\x${char.charCodeAt(0).toString(16)}`)
    .replace(/\p{Surrogate}/gu, (char) => `\\u${char.charCodeAt(0).toString(16)}`)
    .replace(DIRECTIONAL, (char) => `<U+${char.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
}

const textOf = (place) => data.vocabulary[tokens[place]];
const valueOf = (place, mode = state.mode) => {
  const value = columns[mode][place];
  return value === NOTHING ? null : value / UNIT;
};
const signed = (value, digits = 3) => `${value > 0 ? "+" : ""}${value.toFixed(digits)}`;

function colorOf(value, mode) {
  if (value === null) return "";
  const strength = Math.min(1, Math.abs(value) / mode.scale) ** 0.8 * 0.78;
  if (strength < 0.015) return "";
  const rgb = !mode.signed ? "139,92,200" : value > 0 ? "214,72,52" : "44,110,214";
  return `rgba(${rgb},${strength.toFixed(3)})`;
}

function rewardColor(reward) {
  if (reward === null) return "var(--faint)";
  const { low, high } = data.rewards;
  const share = high > low ? (reward - low) / (high - low) : reward > 0 ? 1 : 0;
  return `color-mix(in oklab, #0f8a5f ${Math.round(100 * share)}%, #b8433a)`;
}

// ---- cards -------------------------------------------------------------------------------------

const filled = new IntersectionObserver(
  (entries) => entries.forEach((entry) => entry.isIntersecting && fill(entry.target)),
  { root: $("main"), rootMargin: "600px" },
);

function card(place) {
  const sample = data.samples[place];
  const node = make("article", "card");
  node.dataset.sample = place;
  if (sample.void) node.classList.add("void");
  if (sample.truncated) node.classList.add("truncated");
  const head = make("div", "head");
  const reward = make("span", "reward", sample.reward === null ? "no reward" : String(+sample.reward.toFixed(4)));
  reward.style.setProperty("--dot", rewardColor(sample.reward));
  head.append(reward);
  if (sample.void) head.append(make("span", "badge warn", "void"));
  if (sample.truncated) head.append(make("span", "badge warn", "truncated"));
  if (sample.stop) head.append(make("span", "badge", visible(sample.stop)));
  if (sample.advantage !== null) head.append(make("span", "", `A ${signed(sample.advantage, 2)}`));
  head.append(make("span", "", `${sample.size} tokens`));
  head.title = visible(sample.id);
  node.append(head);
  filled.observe(node);
  return node;
}

function fill(node) {
  filled.unobserve(node);
  if (node.dataset.filled) return;
  node.dataset.filled = "1";
  const sample = data.samples[node.dataset.sample];
  let calls = 0;
  for (const [kind, start, end, isVoid] of sample.turns) {
    if (kind === ACTION) node.append(action(sample, start, end, isVoid));
    else if (kind === PROMPT) node.append(folded(`prompt, ${end - start} tokens`, sample, start, end));
    else node.append(folded("tool", sample, start, end, sample.tools[calls++]));
  }
  for (; calls < sample.tools.length; calls++) node.append(folded("tool", sample, 0, 0, sample.tools[calls]));
  const why = Object.entries(sample.detail).map(([name, value]) => `${visible(name)} ${value === null ? "?" : +value.toFixed(4)}`);
  if (why.length) node.append(make("div", "why", why.join(" \u00b7 ")));
}

function action(sample, start, end, isVoid) {
  const turn = make("div", "turn");
  if (isVoid) turn.append(make("span", "badge warn", "void turn"), " ");
  const spans = new Map(sample.spans.map((span) => [Math.max(span[2], start), span]));
  for (let at = start; at < end; at++) {
    const span = spans.get(at);
    if (span && span[3] > at) {
      const mark = make("span", "span", `v${span[0]}`);
      mark.title = `tokens ${span[2]} to ${span[3] - 1} were sampled by version ${span[0]}, digest ${span[1]}`;
      mark.style.setProperty("--span", `hsl(${(span[0] * 67) % 360} 55% 50%)`);
      turn.append(mark);
    }
    turn.append(token(sample, at));
  }
  return turn;
}

function token(sample, at) {
  const place = sample.start + at;
  const node = make("span", "t");
  const text = textOf(place);
  node.textContent = visible(text).replace(/\n/g, "\u23ce\n");
  node.dataset.place = place;
  const value = valueOf(place);
  node.style.background = colorOf(value, data.modes[state.mode]);
  if (columns[0][place] === NOTHING) node.classList.add("untrained");
  return node;
}

function folded(title, sample, start, end, call) {
  const node = make("details", "part");
  const summary = make("summary", "", "");
  if (call) summary.append(make("b", "", "tool"), ` ${visible(call.status)}${call.s === null ? "" : `, ${call.s.toFixed(2)} s`}`);
  else summary.append(title);
  node.append(summary);
  node.addEventListener("toggle", () => {
    if (!node.open || node.dataset.filled) return;
    node.dataset.filled = "1";
    if (call) node.append(make("div", "", "code"), make("pre", "mono", visible(call.code)), make("div", "", "output"), make("pre", "mono", visible(call.output)));
    if (end > start) {
      const text = [];
      for (let at = start; at < end; at++) text.push(textOf(sample.start + at));
      node.append(make("div", "", `as the policy read it, ${end - start} tokens`), make("pre", "mono", visible(text.join(""))));
    }
  });
  return node;
}

// ---- the page ----------------------------------------------------------------------------------

function showGroup(index) {
  state.group = Math.max(0, Math.min(data.groups.length - 1, index));
  const group = data.groups[state.group];
  const main = $("main");
  main.replaceChildren();
  if (data.notes.length) {
    const notes = make("details", "notes");
    notes.append(make("summary", "", "How these numbers were made"), ...data.notes.map((note) => make("p", "", visible(note))));
    main.append(notes);
  }
  const head = make("section", "prompt");
  head.append(make("h2", "", `${visible(group.name)}, ${group.samples.length} episodes`), make("div", "text", visible(group.prompt)));
  if (group.label) {
    const answer = make("div", "answer", "label: ");
    answer.append(make("b", "text", visible(group.label)));
    head.append(answer);
  }
  const cards = make("div", "cards");
  cards.append(...group.samples.map(card));
  main.append(head, cards);
  main.scrollTop = 0;
  // What is in view is filled at once, so that a jump finds its token.
  [...cards.children].slice(0, 12).forEach(fill);
  markHits();
  markCurrent();
}

function showMode(index) {
  if (!data.modes[index]) return;
  state.mode = index;
  state.worst = -1;
  const mode = data.modes[index];
  [...$("modes").children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
  const legend = $("legend");
  const bar = make("i");
  const stops = (mode.signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.5, 1]).map((x) => colorOf(x * mode.scale, mode) || "transparent");
  bar.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
  legend.replaceChildren(mode.signed ? signed(-mode.scale, 2) : "0", bar, mode.signed ? signed(mode.scale, 2) : mode.scale.toFixed(2));
  legend.title = `${mode.meaning}, nats`;
  for (const node of document.querySelectorAll(".t")) node.style.background = colorOf(valueOf(+node.dataset.place), mode);
  if (state.side === "worst") showSide("worst");
}

function sampleAt(place) {
  let low = 0, high = data.samples.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (data.samples[middle].start <= place) low = middle;
    else high = middle - 1;
  }
  return low;
}

function jumpTo(place) {
  const sample = sampleAt(place);
  const group = data.groupOf[sample];
  if (group !== state.group || !document.querySelector(`.card[data-sample="${sample}"]`)) showGroup(group);
  fill(document.querySelector(`.card[data-sample="${sample}"]`));
  document.querySelectorAll(".t.at").forEach((node) => node.classList.remove("at"));
  const node = document.querySelector(`.t[data-place="${place}"]`);
  if (!node) return;
  node.classList.add("at");
  node.scrollIntoView({ block: "center", inline: "nearest" });
  inspect(place);
}

function inspect(place) {
  const sample = data.samples[sampleAt(place)];
  const at = place - sample.start;
  const span = sample.spans.find(([, , start, end]) => start <= at && at < end);
  const parts = [["", JSON.stringify(visible(textOf(place)))], ["id", data.ids[tokens[place]]], ["position", at]];
  data.modes.forEach((mode, index) => {
    const value = valueOf(place, index);
    if (value !== null) parts.push([mode.name, mode.signed ? signed(value) : `${value.toFixed(3)} (p ${Math.exp(-value).toPrecision(3)})`]);
  });
  if (span) parts.push(["version", span[0]]);
  const box = $("inspector");
  box.replaceChildren();
  for (const [name, value] of parts) box.append(name ? ` ${name} ` : "", make("b", "", String(value)), "  ");
}

function item(name, far, line, onClick) {
  const node = make("button", "item");
  const top = make("div", "top");
  top.append(make("span", "name", name), make("span", "far", far));
  node.append(top, make("div", "line", line));
  node.addEventListener("click", onClick);
  return node;
}

const around = (place) => {
  const sample = data.samples[sampleAt(place)];
  const text = [];
  for (let at = Math.max(sample.start, place - 4); at < Math.min(sample.start + sample.size, place + 3); at++) text.push(textOf(at));
  return visible(text.join("")).replace(/\s+/g, " ");
};

function showSide(side) {
  state.side = side;
  document.querySelectorAll("[data-side]").forEach((tab) => tab.setAttribute("aria-selected", String(tab.dataset.side === side)));
  const list = $("list");
  list.scrollTop = 0;
  if (side === "groups") {
    list.replaceChildren(...data.groups.map((group, index) => {
      const own = group.prompt.slice(data.shared, data.shared + 160).trim();
      const node = item(visible(group.name), "", visible(own), () => showGroup(index));
      const dots = make("span", "dots");
      for (const place of group.samples.slice(0, 32)) {
        const dot = make("i");
        dot.style.setProperty("--dot", rewardColor(data.samples[place].reward));
        dots.append(dot);
      }
      node.querySelector(".far").replaceWith(dots);
      dots.style.marginLeft = "auto";
      return node;
    }));
  } else if (side === "worst") {
    const mode = data.modes[state.mode];
    list.replaceChildren(...mode.worst.map((place, rank) => {
      const value = valueOf(place);
      const text = visible(textOf(place)).replace(/\n/g, "\u23ce");
      return item(text.trim() ? text : JSON.stringify(text), mode.signed ? signed(value) : value.toFixed(3), around(place), () => toWorst(rank));
    }));
  } else {
    list.replaceChildren(...state.found.map(([sample, place, line]) =>
      item(visible(data.groups[data.groupOf[sample]].name), "", line, () => jumpTo(place))));
  }
  markCurrent();
}

function toWorst(rank) {
  const { worst } = data.modes[state.mode];
  if (!worst.length) return;
  state.worst = (rank + worst.length) % worst.length;
  jumpTo(worst[state.worst]);
  markCurrent();
}

function markCurrent() {
  const current = { groups: state.group, worst: state.worst }[state.side];
  [...$("list").children].forEach((node, at) => node.setAttribute("aria-current", String(at === current)));
  $("list").children[current]?.scrollIntoView({ block: "nearest" });
}

// ---- search ------------------------------------------------------------------------------------

function search(needle) {
  state.needle = needle.toLowerCase();
  state.found = [];
  const tab = document.querySelector('[data-side="found"]');
  if (state.needle) {
    data.samples.forEach((sample, index) => {
      let text = "";
      const starts = [];
      for (let at = 0; at < sample.size; at++) {
        starts.push(text.length);
        text += textOf(sample.start + at);
      }
      const lower = text.toLowerCase();
      for (let hit = lower.indexOf(state.needle); hit >= 0 && state.found.length < 500; hit = lower.indexOf(state.needle, hit + 1)) {
        let at = starts.findIndex((start) => start > hit);
        at = at < 0 ? sample.size - 1 : at - 1;
        state.found.push([index, sample.start + at, visible(text.slice(Math.max(0, hit - 24), hit + 60)).replace(/\s+/g, " ")]);
        break;
      }
    });
  }
  tab.hidden = !state.needle;
  tab.textContent = `Found ${state.found.length}`;
  markHits();
  showSide(state.needle ? "found" : "groups");
}

function markHits() {
  for (const node of document.querySelectorAll(".card")) {
    const own = [...node.querySelectorAll(".t")];
    const texts = own.map((part) => textOf(+part.dataset.place).toLowerCase());
    own.forEach((part) => part.classList.remove("hit"));
    if (!state.needle) continue;
    const whole = texts.join("");
    for (let hit = whole.indexOf(state.needle); hit >= 0; hit = whole.indexOf(state.needle, hit + state.needle.length)) {
      let at = 0;
      own.forEach((part, index) => {
        const end = at + texts[index].length;
        if (end > hit && at < hit + state.needle.length) part.classList.add("hit");
        at = end;
      });
    }
  }
}

// ---- start -------------------------------------------------------------------------------------

const KEYS = {
  j: () => showGroup(state.group + 1),
  k: () => showGroup(state.group - 1),
  n: () => toWorst(state.worst + 1),
  p: () => toWorst(state.worst - 1),
  o: () => document.querySelectorAll("details.part").forEach((node) => { node.open = true; }),
  "/": () => $("search").focus(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("search")) {
    if (event.key === "Escape") { $("search").value = ""; search(""); $("search").blur(); }
    if (event.key === "Enter" && state.found.length) jumpTo(state.found[0][1]);
    return;
  }
  const act = KEYS[event.key] ?? (/^[1-4]$/.test(event.key) ? () => showMode(+event.key - 1) : null);
  if (act) { event.preventDefault(); act(); }
}

// Prompts begin with the same template; a list shows where they part, from the beginning of a word.
function sharedPrefix(texts) {
  let length = Math.min(...texts.map((text) => text.length));
  for (const text of texts) while (text.slice(0, length) !== texts[0].slice(0, length)) length--;
  return texts.length > 1 ? texts[0].slice(0, length).search(/\s\S*$/) + 1 : 0;
}

async function start() {
  const [json, ids, numbers] = await Promise.all(["data", "tokens", "numbers"].map(unpack));
  data = JSON.parse(new TextDecoder().decode(json));
  tokens = new Uint32Array(ids.buffer);
  const all = new Int16Array(numbers.buffer);
  columns = data.modes.map((_, index) => all.subarray(index * tokens.length, (index + 1) * tokens.length));
  data.groupOf = [];
  data.groups.forEach((group, index) => group.samples.forEach((place) => { data.groupOf[place] = index; }));
  data.shared = sharedPrefix(data.groups.map((group) => group.prompt));
  const rewards = data.samples.map((sample) => sample.reward).filter((reward) => reward !== null);
  data.rewards = { low: Math.min(...rewards, 0), high: Math.max(...rewards, 0) };
  $("modes").append(...data.modes.map((mode, index) => {
    const button = make("button", "", mode.name);
    button.title = `${mode.meaning}, nats (key ${index + 1})`;
    button.addEventListener("click", () => showMode(index));
    return button;
  }));
  showSide("groups");
  showGroup(0);
  showMode(0);
  document.addEventListener("keydown", onKey);
  document.addEventListener("mouseover", (event) => event.target.dataset?.place && inspect(+event.target.dataset.place));
  document.querySelectorAll("[data-side]").forEach((tab) => tab.addEventListener("click", () => showSide(tab.dataset.side)));
  $("search").addEventListener("input", (event) => search(event.target.value));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start().catch((error) => {
  $("main").textContent = `The episodes could not be shown (${error.message}). Take a browser of 2023 or later.`;
  throw error;
});
