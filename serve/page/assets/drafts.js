// -- drafts: each has its text and its versions; the browser stores them -------------------------------------------

const KEY = 'inkling.drafts', MOST_GROUPS = 20, TITLE = 32;
// {current: id, list: [{id, text, parts, groups, seeds, changed}]}; a group has {base, versions: [{text, parts}], at}: texts
// that begin with the same base and continue differently.
let drafts = { current: 1, list: [] }, opened = false, saving;
const stored = (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
const draft = () => drafts.list.find((each) => each.id === drafts.current);
const empty = (id) => ({ id, text: '', parts: [], groups: [], changed: Date.now() });
const snapshot = () => ({ text, parts: parts.map((part) => [...part]) });
const write = () => {
  if (!opened) return;
  clearTimeout(saving);
  Object.assign(draft(), snapshot(), { seeds });
  // Another window may have changed the other drafts.
  const others = (stored(KEY)?.list ?? []).filter((each) => each.id !== drafts.current && !removed.has(each.id));
  const otherIds = new Set(others.map((each) => each.id));
  const mine = drafts.list.filter((each) => each.id === drafts.current || !otherIds.has(each.id));
  drafts.list = [...others, ...mine].sort((a, b) => a.id - b.id);
  try {
    localStorage.setItem(KEY, JSON.stringify(drafts));
    localStorage.setItem('inkling.paper', JSON.stringify(text));
  } catch { /* full, or switched off */ }
};
const removed = new Set();
const save = () => {
  if (!opened) return;
  clearTimeout(saving);
  saving = setTimeout(write, 250);
};
const load = ({ text: loaded, parts: owners }) => {
  if (writing !== null) trigger('halt');
  writing = null;
  area().value = loaded;
  text = area().value;
  parts = owners.map((part) => [...part]);
  changed();
  show();
  refresh(0);
};
const openDraft = (id) => {
  drafts.current = id;
  seeds = draft().seeds ?? {};
  load(draft());
};
const newDraft = () => {
  write();
  const id = Math.max(0, ...drafts.list.map((each) => each.id)) + 1;
  drafts.list.push(empty(id));
  openDraft(id);
  area().focus();
};
const deleteDraft = () => {
  if (text && !window.confirm('Delete this draft and its versions?')) return;
  const index = drafts.list.indexOf(draft());
  removed.add(drafts.current);
  drafts.list.splice(index, 1);
  if (!drafts.list.length) drafts.list.push(empty(drafts.current + 1));
  openDraft(drafts.list[Math.max(0, index - 1)].id);
};

// -- versions ----------------------------------------------------------------------------------------------------------

const groupOf = (base) => draft().groups.find((group) => group.base === base);
// The longest beginning of the text that has other versions.
const group = () => draft()?.groups.filter(({ base, versions }) => versions.length > 1 && text.startsWith(base))
  .sort((a, b) => b.base.length - a.base.length)[0];
const keep = (found) => {
  // After Undo there is nothing to keep.
  if (text.length > found.base.length) found.versions[found.at] = snapshot();
};
// The text as it is becomes a version, because something else will follow `base`.
const keepVersion = (base) => {
  let found = groupOf(base);
  if (!found) {
    found = { base, versions: [snapshot()], at: 0 };
    draft().groups.push(found);
    draft().groups.splice(0, draft().groups.length - MOST_GROUPS);
  }
  keep(found);
  return found;
};
const newVersion = (found) => { found.at = found.versions.push({ text: found.base, parts: [] }) - 1; };
const switchVersion = (step) => {
  readEdits();
  const found = group();
  if (!found?.versions[found.at + step]) return;
  keep(found);
  found.at += step;
  load(found.versions[found.at]);
};

// -- the bar above the text ----------------------------------------------------------------------------------------------

const bar = () => document.querySelector('#sheet-bar');
const titleOf = (each) => {
  const words = (each === draft() ? text : each.text).trim().replace(/\s+/g, ' ');
  return words ? (words.length > TITLE ? `${words.slice(0, TITLE)}…` : words) : 'Empty draft';
};
const showBar = () => {
  const select = bar()?.querySelector('select');
  if (!select || !opened) return;
  const titles = drafts.list.map((each) => [String(each.id), titleOf(each)]);
  if (JSON.stringify(titles) !== select.dataset.titles) {
    select.dataset.titles = JSON.stringify(titles);
    select.replaceChildren(...titles.map(([id, title]) => new Option(title, id)));
  }
  select.value = String(drafts.current);
  const act = (name) => bar().querySelector(`[data-act=${name}]`), found = group();
  act('new').disabled = !text;
  act('delete').disabled = !text && drafts.list.length === 1;
  act('back').disabled = !found || found.at === 0;
  act('forth').disabled = !found || found.at === found.versions.length - 1;
  bar().querySelector('output').textContent = found ? `${found.at + 1}/${found.versions.length}` : '1/1';
};
document.addEventListener('click', ({ target }) => {
  const act = target.closest?.('#sheet-bar button')?.dataset.act;
  if (act) ({ new: newDraft, delete: deleteDraft, back: () => switchVersion(-1), forth: () => switchVersion(1) })[act]();
});
document.addEventListener('change', ({ target }) => {
  if (!target.matches?.('#sheet-bar select')) return;
  const id = Number(target.value);
  readEdits();
  write();
  openDraft(id);
});
window.addEventListener('pagehide', () => { readEdits(); write(); });

// The text that the browser stores may be newer than the draft, or from a page without drafts: then it was typed.
const openDrafts = () => {
  if (!area()) { requestAnimationFrame(openDrafts); return; }
  const found = stored(KEY), now = stored('inkling.paper');
  if (found?.list?.length) {
    drafts = found;
    if (!draft()) drafts.current = drafts.list[0].id;
  } else {
    drafts = { current: 1, list: [empty(1)] };
    const prompt = stored('inkling.look-prompt');
    if (prompt) drafts.list.push({ ...empty(2), text: prompt, parts: [[prompt.length, 0]] });
  }
  for (const each of drafts.list) {
    for (const { parts: owners } of [each, ...each.groups.flatMap(({ versions }) => versions)]) {
      for (const [, piece] of owners) count = Math.max(count, piece);
    }
  }
  opened = true;
  const typed = area().value;
  ({ text, parts } = structuredClone(draft()));
  seeds = draft().seeds ?? {};
  area().value = typed || (now ?? text);
  readEdits();
  changed();
  show();
  refresh(0);
};
