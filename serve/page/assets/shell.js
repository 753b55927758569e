window.inklingShell = (() => {
  const links = LINKS;
  const MAX_PROMPT = 2000;
  const QUIET_MS = 1200;
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const tabs = () => [...document.querySelectorAll('[role=tablist] [role=tab]')];

  // -- dark theme and projector mode, before anything is visible
  const theme = new URLSearchParams(location.search).get('__theme');
  const system = matchMedia('(prefers-color-scheme: dark)');
  const paint = () => root.classList.toggle('in-dark', theme === 'dark' || (theme !== 'light' && system.matches));
  paint();
  system.addEventListener('change', paint);
  const PROJECTOR = 'inkling.projector';
  const storedProjector = () => { try { return localStorage.getItem(PROJECTOR) === 'true'; } catch { return false; } };
  const project = (on) => {
    root.classList.toggle('projector', on);
    byId('projector')?.setAttribute('aria-pressed', String(on));
    try { localStorage.setItem(PROJECTOR, String(on)); } catch { /* switched off */ }
    // Charts that measure their text draw again.
    dispatchEvent(new Event('resize'));
  };
  root.classList.toggle('projector', storedProjector());

  // -- links: the part after # never reaches the server
  const parse = () => new URLSearchParams(location.hash.slice(1));
  const opened = parse();
  const linked = {};
  for (const [what, name] of Object.entries(links[opened.get('tab')] ?? {})) {
    const value = opened.get(what);
    if (value === null || (what === 'seed' && !/^\d{1,15}$/.test(value))) continue;
    linked[name] = what === 'seed' ? Number(value) : value;
  }
  const notice = (text, label, act) => {
    const line = document.createElement('p');
    line.append(text);
    const button = (name, then) => {
      const made = Object.assign(document.createElement('button'), { type: 'button', textContent: name });
      made.addEventListener('click', () => { line.remove(); then?.(); });
      line.append(' ', made);
    };
    if (label) button(label, act);
    button('Close');
    byId('notice').append(line);
  };
  const type = (name, text) => {
    const area = document.querySelector(`#${name} textarea`);
    area.value = text;
    area.dispatchEvent(new Event('input', { bubbles: true }));
  };
  // The value of a component at the opening of the page. A link never replaces a visitor's text without a click.
  const atOpening = (name, stored) => {
    const value = linked[name];
    if (value === undefined) return stored;
    const isText = Object.values(links).some(({ prompt }) => prompt === name);
    if (!isText || !stored || stored === value) return value;
    notice('This link has its own text.', 'Replace my text', () => type(name, value));
    return stored;
  };
  const missingModel = (name) => notice(`The link names the model “${name}”, which this server does not have.`);
  const linkTo = (tab) => {
    const parts = new URLSearchParams({ tab });
    let left = 0;
    for (const [what, name] of Object.entries(links[tab] ?? {})) {
      const text = what === 'prompt' && document.querySelector(`#${name} textarea`);
      const value = text ? text.value : window.inklingStorage.value(name);
      if (value === undefined || value === null || value === '') continue;
      if (what === 'prompt' && value.length > MAX_PROMPT) left = value.length;
      else parts.set(what, value);
    }
    return [`${location.origin}${location.pathname}#${parts}`, left];
  };
  const copyLink = async () => {
    const [address, left] = linkTo(selected());
    let text = 'Link copied.';
    try { await navigator.clipboard.writeText(address); } catch {
      // Browsers allow it only on HTTPS and on this machine.
      history.replaceState(null, '', address);
      text = 'The address bar has the link.';
    }
    if (left) {
      text += ` It leaves the text out: the text has ${left.toLocaleString('en')} characters,`
        + ` and a link holds ${MAX_PROMPT.toLocaleString('en')}.`;
    }
    byId('notice').replaceChildren();
    notice(text);
  };

  // -- tabs: history and keys
  const selected = () => tabs().find((tab) => tab.ariaSelected === 'true')?.dataset.tabId;
  let arrived = false;
  let following = false;
  const follow = () => {
    const linkedTab = parse().get('tab');
    const tab = tabs().find(({ dataset }) => dataset.tabId === linkedTab) ?? tabs()[0];
    following = true;
    tab?.click();
    following = false;
  };
  addEventListener('popstate', () => {
    // A whole link was pasted into the address bar.
    if (parse().size > 1) location.reload();
    else follow();
  });
  document.addEventListener('click', ({ target }) => {
    const tab = target.closest?.('[role=tab][data-tab-id]');
    if (!tab || following || tab.ariaSelected === 'true') return;
    history.pushState(null, '', `${location.pathname}${location.search}#tab=${tab.dataset.tabId}`);
  }, true);
  document.addEventListener('keydown', (event) => {
    if (event.target.getAttribute?.('role') !== 'tab') return;
    const all = tabs();
    const at = all.indexOf(event.target);
    const goal = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || goal === undefined) return;
    event.preventDefault();
    const tab = all[(goal + all.length) % all.length];
    tab.click();
    tab.focus();
  });

  // -- what Gradio's components lack
  const announced = new WeakMap();
  let timer;
  let announcedTab;
  const newTexts = () => {
    const found = [];
    for (const region of document.querySelectorAll('[id$="-status"], [id$="-note"], .note')) {
      const text = region.checkVisibility() ? region.innerText.trim() : '';
      if (text && announced.get(region) !== text) found.push(text);
      announced.set(region, text);
    }
    return found;
  };
  const announce = () => {
    const found = newTexts();
    if (found.length) byId('announcer').textContent = found.join('. ');
  };
  const repair = () => {
    const all = tabs();
    if (!all.length) return;
    byId('skeleton')?.remove();
    for (const tab of all) tab.tabIndex = tab.ariaSelected === 'true' ? 0 : -1;
    for (const panel of document.querySelectorAll('[role=tabpanel][id]')) {
      panel.setAttribute('aria-labelledby', `${panel.id}-button`);
    }
    // The text inside is the better name.
    document.querySelectorAll('.upload-container[aria-label]').forEach((each) => each.removeAttribute('aria-label'));
    // The keyboard scrolls only what can have the focus.
    for (const box of document.querySelectorAll('[role=tabpanel] .scroll')) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
    if (!arrived) {
      arrived = true;
      if (opened.has('tab')) {
        follow();
        // The components have the values of the link now: a reload must not set them again.
        history.replaceState(null, '', `${location.pathname}${location.search}#tab=${selected()}`);
      }
    }
    if (selected() !== announcedTab) {
      // Texts of an opened tab are not announced.
      announcedTab = selected();
      newTexts();
    }
    // A status may change many times a second: screen readers get it when it no longer changes.
    clearTimeout(timer);
    timer = setTimeout(announce, QUIET_MS);
  };
  document.addEventListener('DOMContentLoaded', () => {
    project(storedProjector());
    byId('projector').addEventListener('click', () => project(!root.classList.contains('projector')));
    byId('copy-link').addEventListener('click', copyLink);
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      setTimeout(() => { waiting = false; repair(); }, 50);
    };
    new MutationObserver(later).observe(document.querySelector('gradio-app'), {
      childList: true, subtree: true, characterData: true, attributeFilter: ['aria-selected'],
    });
    later();
  });
  return { atOpening, missingModel };
})();
