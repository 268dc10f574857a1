// The rollout viewer: step -> problem -> its samples side by side, and every token's numbers.
//
// The place is the address: #run=0&step=12&problem=3&sample=5. Whatever came out of a model is put
// into the page as text (textContent), never as HTML; marks that would turn the direction of the
// text around them are shown by their number, and every token is isolated from its neighbours.
"use strict";

const VALUES = {
  advantage: { column: "advantages", sign: true, full: 2, help: "advantage of the token" },
  logprob: { column: "logprobs", full: -4, help: "log probability under the sampler" },
  entropy: { column: "entropy", full: 2, help: "entropy of the policy there, nats" },
  "KL to reference": { column: "kl", sign: true, full: 2, help: "log π − log π_ref" },
  ratio: { column: "ratio", log: true, sign: true, full: 0.3, help: "π / π_old at the last update" },
  "sampler gap": { column: "gap", sign: true, full: 0.05, help: "log π of the trainer − that of the sampler" },
  "step credit": { column: "credit", sign: true, full: 1, help: "what the token's step was paid" },
};
const LONG = 3000; // tokens of a sample that are shown before one asks for the rest
const ODD = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/u;

const at = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpacked(id) {
  const bytes = bytesOf(at(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** Episodes of a run, each knowing where its numbers begin in the columns. */
function openEpisodes(run) {
  let start = 0;
  for (const episode of run.episodes) {
    episode.start = start;
    start += episode.length;
    episode.right = Boolean(episode.rewards.accuracy);
  }
  run.byStep = new Map();
  for (const episode of run.episodes) {
    if (!run.byStep.has(episode.step)) run.byStep.set(episode.step, new Map());
    const problems = run.byStep.get(episode.step);
    if (!problems.has(episode.prompt)) problems.set(episode.prompt, []);
    problems.get(episode.prompt).push(episode);
  }
  run.steps = [...run.byStep.keys()].sort((a, b) => a - b);
}

function valueOf(run, episode, index, name) {
  const column = VALUES[name].column;
  if (column === "credit") return creditOf(episode, index);
  const value = run.columns[column][episode.start + index];
  return value === null ? null : value / 1000;
}

function stepOf(episode, index) {
  return (episode.step_ends || []).findIndex((end) => index <= end);
}

function creditOf(episode, index) {
  const step = stepOf(episode, index);
  const paid = episode.step_rewards || [];
  return step < 0 || step >= paid.length ? null : paid[step];
}

function colour(value, { sign, full, log }) {
  if (value === null) return "";
  const scaled = (log ? Math.log(Math.max(value, 1e-6)) : value) / full;
  const strength = Math.min(1, Math.abs(scaled)) * 0.75;
  if (strength < 0.01) return "";
  return `rgba(var(--${sign ? (scaled > 0 ? "up" : "down") : "more"}), ${strength.toFixed(3)})`;
}

/** A token's text, with what cannot be seen, or would disturb what can, made visible. */
function putText(node, text) {
  if (!ODD.test(text)) {
    node.append(text);
    return;
  }
  for (const c of text) {
    if (!ODD.test(c)) node.append(c);
    else if (c === "\n") node.append(element("span", { class: "odd", text: "⏎" }), c);
    else {
      const code = c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(element("span", { class: "odd", text: `U+${code}` }));
    }
  }
}

class Viewer {
  constructor(root, runs) {
    this.root = root;
    this.runs = runs;
    this.place = { run: 0, step: null, problem: 0, sample: null };
    this.value = "advantage";
    this.query = { kind: "", text: "" };
    this.build();
    this.follow();
    window.addEventListener("hashchange", () => this.follow());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  get run() {
    return this.runs[this.place.run];
  }

  build() {
    const go = (change) => (event) => this.go(change(event));
    this.slider = element("input", { type: "range", min: 0, "aria-label": "step", oninput: go((e) => ({ step: this.run.steps[e.target.value], problem: 0, sample: null })) });
    this.stepText = element("output");
    this.problem = element("select", { "aria-label": "problem", onchange: go((e) => ({ problem: Number(e.target.value), sample: null })) });
    this.which = element("select", { "aria-label": "run", onchange: go((e) => ({ run: Number(e.target.value), step: null, problem: 0, sample: null })) });
    this.runs.forEach((run, i) => this.which.append(element("option", { value: i, text: run.name })));
    this.kind = element("select", { "aria-label": "which samples", onchange: () => this.search() });
    for (const kind of ["all samples", "right", "wrong", "truncated", "no answer"]) this.kind.append(element("option", { value: kind, text: kind }));
    this.words = element("input", { type: "search", placeholder: "text in question or sample", "aria-label": "text", oninput: () => this.search() });
    this.found = element("div", { class: "found" });
    this.values = element("div", { class: "values", role: "group", "aria-label": "colour tokens by" });
    Object.entries(VALUES).forEach(([name, { help }], i) => {
      this.values.append(element("button", { type: "button", title: `${help} (key ${i + 1})`, "data-value": name, text: name, onclick: () => this.show(name) }));
    });
    this.body = element("div");
    this.tip = element("div", { id: "tip", role: "tooltip" });
    const keys = element("p", { class: "hint" });
    for (const [key, what] of [["←", "step"], ["→", ""], ["↑", "problem"], ["↓", ""], ["1–7", "colour"], ["n", "next found"], ["/", "search"]]) {
      keys.append(element("kbd", { text: key }), ` ${what} `);
    }
    const place = element("div", { class: "place" });
    if (this.runs.length > 1) place.append(this.which);
    place.append("step", this.slider, this.stepText, this.problem);
    this.root.replaceChildren(place, element("div", { class: "place" }, this.kind, this.words), this.found, this.values, keys, this.body);
    document.body.append(this.tip);
    this.body.addEventListener("mouseover", (event) => this.hover(event));
    this.body.addEventListener("mouseout", () => (this.tip.style.display = "none"));
  }

  /** Take the place from the address; addresses of sections are left to the browser. */
  follow() {
    const words = new URLSearchParams(location.hash.slice(1));
    const number = (name) => (words.has(name) && /^\d+$/.test(words.get(name)) ? Number(words.get(name)) : null);
    if (number("step") !== null) {
      const run = Math.min(number("run") ?? 0, this.runs.length - 1);
      this.place = { run, step: number("step"), problem: number("problem") ?? 0, sample: number("sample") };
    }
    this.draw();
    if (number("step") !== null) at("rollouts").scrollIntoView();
  }

  go(change) {
    this.place = { ...this.place, ...change };
    this.draw();
    const { run, step, problem, sample } = this.place;
    const words = sample === null ? "" : `&sample=${sample}`;
    history.replaceState(null, "", `#run=${run}&step=${step}&problem=${problem}${words}`);
  }

  show(name) {
    this.value = name;
    this.draw();
  }

  move(list, here, by) {
    const index = list.indexOf(here) + by;
    return index >= 0 && index < list.length ? list[index] : here;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const { step, problem } = this.place;
    const problems = [...(this.run.byStep.get(step) || new Map()).keys()];
    const actions = {
      ArrowLeft: () => this.go({ step: this.move(this.run.steps, step, -1), problem: 0, sample: null }),
      ArrowRight: () => this.go({ step: this.move(this.run.steps, step, 1), problem: 0, sample: null }),
      ArrowUp: () => this.go({ problem: this.move(problems, problem, -1), sample: null }),
      ArrowDown: () => this.go({ problem: this.move(problems, problem, 1), sample: null }),
      "/": () => this.words.focus(),
      n: () => this.next(),
    };
    const chosen = Object.keys(VALUES)[Number(event.key) - 1];
    const action = actions[event.key] || (chosen && (() => this.show(chosen)));
    const box = this.root.getBoundingClientRect();
    const seen = box.top < innerHeight && box.bottom > 0; // elsewhere the arrows scroll
    if (!action || !seen) return;
    event.preventDefault();
    action();
  }

  matches(episode) {
    const kind = this.kind.value;
    const text = this.words.value.toLowerCase();
    const ofKind = {
      right: episode.right,
      wrong: !episode.right,
      truncated: episode.finish_reason !== "eos",
      "no answer": episode.found === null,
    };
    return (ofKind[kind] ?? true) && (!text || `${episode.question}\n${episode.text}`.toLowerCase().includes(text));
  }

  search() {
    const asked = this.kind.value !== "all samples" || this.words.value;
    this.hits = asked ? this.run.episodes.filter((episode) => this.matches(episode)) : [];
    this.hit = -1;
    this.found.replaceChildren();
    if (asked) this.found.append(`${this.hits.length} of ${this.run.episodes.length} samples: `);
    for (const episode of this.hits.slice(0, 200)) this.found.append(this.link(episode), " ");
    if (this.hits.length > 200) this.found.append("…");
    this.draw();
  }

  next() {
    if (!this.hits || !this.hits.length) return;
    this.hit = (this.hit + 1) % this.hits.length;
    const { step, prompt, sample } = this.hits[this.hit];
    this.go({ step, problem: prompt, sample });
  }

  link(episode, text) {
    const { step, prompt, sample } = episode;
    return element("a", { href: `#run=${this.place.run}&step=${step}&problem=${prompt}&sample=${sample}`, text: text || `${step}/${prompt}/${sample}` });
  }

  draw() {
    const run = this.run;
    if (!run.steps.length) {
      this.body.replaceChildren(element("p", { text: "This run has logged no rollouts." }));
      return;
    }
    const wanted = this.place.step ?? run.steps[run.steps.length - 1];
    const step = run.steps.reduce((best, s) => (Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best), run.steps[0]);
    const problems = run.byStep.get(step);
    const problem = problems.has(this.place.problem) ? this.place.problem : [...problems.keys()][0];
    this.place = { ...this.place, step, problem };
    this.which.value = this.place.run;
    this.slider.max = run.steps.length - 1;
    this.slider.value = run.steps.indexOf(step);
    this.stepText.textContent = step === wanted ? `${step}` : `${step} (${wanted} is not logged)`;
    this.problem.replaceChildren(...[...problems.keys()].map((number) => element("option", { value: number, text: `problem ${number}: ${problems.get(number)[0].problem}` })));
    this.problem.value = problem;
    for (const button of this.values.children) button.setAttribute("aria-pressed", button.dataset.value === this.value);
    this.drawGroup(problems.get(problem));
  }

  drawGroup(group) {
    const first = group[0];
    const question = element("div", { class: "question" });
    putText(question, first.question ?? "");
    question.append(element("b", { text: `answer: ${first.answer}` }));
    if (first.hint) {
      question.append(element("b", { text: `hint, level ${first.level}:` }));
      putText(question, first.hint);
    }
    const others = this.run.episodes.filter((e) => e.problem === first.problem && e.step !== first.step);
    const again = element("p", { class: "hint" });
    if (others.length) {
      again.append("the same problem at step ");
      const steps = new Map(others.map((e) => [e.step, e]));
      for (const [step, episode] of steps) again.append(this.link({ ...episode, sample: 0 }, `${step}`), " ");
    }
    const shared = sharedPrefix(group);
    const samples = element("div", { class: "samples" });
    const shown = group.filter((episode) => this.matches(episode));
    const chosen = (alike) => alike.some((e) => e.sample === this.place.sample);
    const cards = sameTokens(shown).sort((a, b) => chosen(b) - chosen(a)); // what was asked for first
    for (const alike of cards) samples.append(this.card(alike, shared));
    const hint = element("p", { class: "hint", text: `${group.length} samples, by reward; the first ${shared} tokens are the same in all` });
    this.body.replaceChildren(question, again, hint, samples);
  }

  /** One sample, and the numbers of those that have the very same tokens. */
  card(alike, shared) {
    const episode = alike.find((e) => e.sample === this.place.sample) || alike[0];
    const rewards = Object.entries(episode.rewards).map(([name, value]) => `${name} ${Number(value.toFixed(3))}`).join(" · ");
    const found = episode.found === "" ? "" : episode.found === null ? "no answer" : `answer ${episode.found}`;
    const answer = element("span", { class: "answer" });
    putText(answer, found);
    const head = element("header", { title: rewards, onclick: () => this.go({ sample: episode.sample }) },
      element("b", { text: alike.map((e) => `#${e.sample}`).join(" ") }), answer, element("span", { text: rewards }),
      element("span", { class: "hint", text: `${episode.length} tokens${episode.finish_reason === "eos" ? "" : ", cut"}` }));
    const chosen = alike.some((e) => e.sample === this.place.sample) ? " chosen" : "";
    const strip = element("div", { class: "strip", dir: "ltr" });
    const card = element("article", { class: `sample ${episode.right ? "right" : "wrong"}${chosen}` }, head, strip);
    this.fill(strip, episode, shared, LONG);
    return card;
  }

  fill(strip, episode, shared, limit) {
    strip.replaceChildren();
    if (!episode.tokens.length) {
      putText(strip, episode.text.slice(0, 20 * limit)); // the tokenizer is gone: no strip
      return;
    }
    const ends = new Map((episode.step_ends || []).map((end, i) => [end, i]));
    for (let i = 0; i < Math.min(limit, episode.length); i++) {
      const token = element("span", { class: i < shared ? "t shared" : "t" });
      putText(token, this.run.pieces[episode.tokens[i]]);
      token.style.backgroundColor = colour(valueOf(this.run, episode, i, this.value), VALUES[this.value]);
      token.token = { episode, index: i };
      strip.append(token);
      if (ends.has(i)) strip.append(this.boundary(episode, ends.get(i)));
    }
    if (limit < episode.length) {
      strip.append(element("button", { type: "button", text: `${episode.length - limit} more tokens`, onclick: () => this.fill(strip, episode, shared, Infinity) }));
    }
  }

  boundary(episode, step) {
    const words = [`step ${step}`];
    if (episode.step_scores) words.push(`score ${episode.step_scores[step].toFixed(2)}`);
    if (episode.step_rewards && step < episode.step_rewards.length) words.push(`paid ${episode.step_rewards[step].toFixed(2)}`);
    return element("span", { class: "step", text: words.join(" · ") });
  }

  hover(event) {
    const token = event.target.closest(".t")?.token;
    if (!token) return;
    const { episode, index } = token;
    const table = element("table");
    const row = (name, text) => table.append(element("tr", {}, element("td", { text: name }), element("td", { text })));
    row("token", `${index} of ${episode.length}`);
    for (const name of Object.keys(VALUES)) {
      const value = valueOf(this.run, episode, index, name);
      if (value !== null) row(name, value.toFixed(3));
    }
    const logprob = valueOf(this.run, episode, index, "logprob");
    if (logprob !== null) row("probability", `${(100 * Math.exp(logprob)).toFixed(1)}%`);
    const clipped = this.run.columns.clipped[episode.start + index];
    if (clipped) row("clipped", clipped > 0 ? "above" : "below");
    this.tip.replaceChildren(table);
    this.tip.style.display = "block";
    const box = event.target.closest(".t").getBoundingClientRect();
    const { width, height } = this.tip.getBoundingClientRect();
    this.tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 8))}px`;
    this.tip.style.top = `${box.bottom + height + 8 < innerHeight ? box.bottom + 4 : Math.max(4, box.top - height - 4)}px`;
  }
}

/** Samples by falling reward, those of the same tokens together. */
function sameTokens(group) {
  const kinds = new Map();
  for (const episode of [...group].sort((a, b) => b.rewards.total - a.rewards.total)) {
    const key = JSON.stringify([episode.tokens, episode.ids, episode.rewards, episode.text]);
    if (!kinds.has(key)) kinds.set(key, []);
    kinds.get(key).push(episode);
  }
  return [...kinds.values()];
}

function sharedPrefix(group) {
  const [first, ...others] = group.map((episode) => (episode.tokens.length ? episode.tokens : episode.ids));
  if (!others.length) return 0;
  let length = 0;
  while (length < first.length && others.every((tokens) => tokens[length] === first[length])) length++;
  return length;
}
