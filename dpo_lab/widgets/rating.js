// The rating form: shows the view that Python sends, and sends it keys and the time they took.
// Texts from items only ever become text nodes, never markup.

const KEYS = {
  ArrowLeft: "left",
  ArrowRight: "right",
  ArrowDown: "tie",
  Backspace: "undo",
  u: "undo",
  1: "1",
  2: "2",
  3: "3",
  4: "4",
  5: "5",
};

// milliseconds after which a kernel that does not answer is said to be gone
const PATIENCE = 5000;

function make(tag, name, parent, text = "") {
  const node = document.createElement(tag);
  if (name) node.className = `dpo-rate-${name}`;
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

function button(name, parent, label, text, press) {
  const node = make("button", name, parent, text);
  node.type = "button";
  node.setAttribute("aria-label", label);
  node.addEventListener("click", press);
  return node;
}

// a scroll box that the keyboard reaches
function box(name, parent, label) {
  const node = make("div", name, parent);
  node.tabIndex = 0;
  node.dir = "auto";
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", label);
  return node;
}

function build(el, press) {
  const root = make("div", "form", el);
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Rating form");

  // progress, who, undo
  const head = make("div", "head", root);
  const count = make("span", "count", head);
  const bar = make("progress", "bar", head);
  bar.setAttribute("aria-label", "rated items");
  const who = make("span", "who", head);
  const undo = button("undo", head, "Undo the last key", "undo", () => press("undo"));
  make("kbd", "", undo, "u");

  // what raters are told
  const guide = make("details", "guide", root);
  make("summary", "", guide, "guidelines");
  const guidelines = box("guidelines", guide, "Guidelines");

  // the item
  const prompt = box("prompt", root, "Prompt");
  const answers = make("div", "answers", root);
  const cards = ["left", "right"].map((side, k) => {
    const card = make("div", "card", answers);
    const text = box("answer", card, `${side} answer`);
    const scale = make("div", "scale", card);
    scale.setAttribute("role", "group");
    const digits = [1, 2, 3, 4, 5].map((score) =>
      button("digit", scale, "", String(score), () => press(String(score), k)),
    );
    return { card, text, scale, digits, side };
  });

  const choices = make("div", "choices", root);
  for (const [key, label, sign, before] of [
    ["left", "left is better", "←", true],
    ["tie", "tie", "↓", true],
    ["right", "right is better", "→", false],
  ]) {
    const node = button(`choice`, choices, label, "", () => press(key));
    node.dataset.key = key;
    const parts = [make("kbd", "", null, sign), make("span", "", null, label)];
    node.append(...(before ? parts : parts.reverse()));
  }

  // the end, and what is to be said
  const end = make("div", "end", root);
  const foot = make("div", "foot", root);
  const hint = make("span", "hint", foot);
  make("span", "unfocused", foot, "click the form to use the keys");
  const status = make("span", "status", foot);
  status.setAttribute("role", "status");
  return {
    root, count, bar, who, undo, guide, guidelines, prompt, answers, cards, choices, end, hint, status,
  };
}

function fill(parts, view) {
  const { item } = view;
  parts.count.textContent = `${view.done} of ${view.total}`;
  parts.bar.max = view.total;
  parts.bar.value = view.done;
  parts.who.textContent = view.pass > 1 ? `${view.rater}, pass ${view.pass}` : view.rater;
  parts.undo.setAttribute("aria-disabled", String(!view.can_undo));
  parts.guide.hidden = !view.guidelines;
  parts.guidelines.textContent = view.guidelines;
  parts.status.textContent = view.message;
  parts.root.dataset.key = item ? item.key : "";

  // the item, or the end
  const compared = item !== null && item.answers.length === 2;
  parts.prompt.hidden = parts.answers.hidden = item === null;
  parts.choices.hidden = !compared;
  parts.end.hidden = item !== null;
  parts.end.textContent = item
    ? ""
    : `All ${view.total} are rated. They are in ${view.file}. Undo is still possible.`;
  parts.hint.textContent = !item
    ? ""
    : compared
      ? "or rate the left answer 1 to 5, then the right one: the higher wins"
      : "1 is bad, 5 is good";
  if (!item) return;

  show(parts.prompt, item.prompt, "(empty prompt)");
  parts.cards.forEach(({ card, text, scale, digits, side }, k) => {
    card.hidden = k >= item.answers.length;
    if (card.hidden) return;
    const name = compared ? `${side} answer` : "answer";
    show(text, item.answers[k], "(empty answer)");
    text.setAttribute("aria-label", name);
    scale.setAttribute("aria-label", `Rate the ${name}`);

    // digits rate the answers in turn
    const next = item.scores.length === k;
    card.classList.toggle("dpo-rate-next", next && compared && k > 0);
    digits.forEach((digit, i) => {
      digit.setAttribute("aria-label", `Rate the ${name} ${i + 1} of 5`);
      digit.setAttribute("aria-pressed", String(item.scores[k] === i + 1));
      digit.setAttribute("aria-disabled", String(!next));
    });
  });
}

function show(node, text, instead) {
  if (node.textContent !== text) node.scrollTop = 0;
  node.textContent = text;
  node.dataset.instead = text.trim() ? "" : instead;
}

function render({ model, el }) {
  let view = model.get("view");
  let waiting = 0;

  // seconds for which the page was visible and the form had the focus or the pointer
  let seconds = 0;
  let since = null;
  let pointed = false;
  const watched = () =>
    document.visibilityState === "visible" && (pointed || parts.root.contains(document.activeElement));
  const tick = () => {
    const now = performance.now();
    if (since !== null) seconds += (now - since) / 1000;
    since = watched() ? now : null;
  };

  // `card` is that of a digit that was clicked
  const press = (key, card) => {
    const { item } = view;
    if (waiting || (key === "undo" ? !view.can_undo : !item)) return;
    if (item && item.answers.length === 1 && ["left", "right", "tie"].includes(key)) return;
    if (card !== undefined && item.scores.length !== card) return;
    tick();
    waiting = setTimeout(() => {
      waiting = 0;
      parts.status.textContent =
        "The kernel does not answer. Run this cell again: what was counted is saved.";
    }, PATIENCE);
    model.send({ key, turn: view.turn, seconds });
  };
  const parts = build(el, press);

  const changed = () => {
    const before = view;
    view = model.get("view");
    clearTimeout(waiting);
    waiting = 0;
    if (before.item?.key !== view.item?.key) {
      seconds = 0;
      since = watched() ? performance.now() : null;
    }
    fill(parts, view);
  };

  // Before JupyterLab sees it: a plain key in the form is the form's, so that "d d" deletes no cell.
  // Keys with Ctrl, Alt or Command, Tab, Escape and Shift+Enter stay JupyterLab's and the browser's.
  const onKey = (event) => {
    if (!parts.root.contains(event.target)) return;
    const { key } = event;
    const others = ["Tab", "Escape", "Shift"].includes(key) || (key === "Enter" && event.shiftKey);
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || others) return;
    event.stopImmediatePropagation();
    const name = event.shiftKey ? undefined : KEYS[key];
    if (!name) return;
    event.preventDefault();
    if (!event.repeat) press(name);
  };
  const enter = () => {
    tick();
    pointed = true;
    tick();
  };
  const leave = () => {
    tick();
    pointed = false;
    tick();
  };

  model.on("change:view", changed);
  window.addEventListener("keydown", onKey, true);
  document.addEventListener("visibilitychange", tick);
  parts.root.addEventListener("pointerenter", enter);
  parts.root.addEventListener("pointerleave", leave);
  parts.root.addEventListener("focusin", tick);
  parts.root.addEventListener("focusout", () => setTimeout(tick));
  fill(parts, view);
  return () => {
    clearTimeout(waiting);
    model.off("change:view", changed);
    window.removeEventListener("keydown", onKey, true);
    document.removeEventListener("visibilitychange", tick);
  };
}

export default { render };
