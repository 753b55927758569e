// The filters of lm/generation/filters.py, in their order, for one row of logits. Ties have the same rule: of equal
// values at the border, the lower ids stay.
const inklingFilters = (() => {
  const MASKED = -Infinity, HUGE = 1e300;
  const largest = (logits) => logits.reduce((most, value) => (value > most ? value : most), MASKED);
  const softmax = (logits) => {
    const most = largest(logits), weights = logits.map((value) => Math.exp(value - most));
    const sum = weights.reduce((total, value) => total + value, 0);
    return weights.map((value) => value / sum);
  };
  const descending = (logits) => logits.slice().sort().reverse();
  const keepFrom = (logits, border, count) => {
    let room = count;
    for (const value of logits) if (value > border) room -= 1;
    return logits.map((value) => (value > border || (value === border && room-- > 0) ? value : MASKED));
  };
  const counted = (logits, counts, change) => {
    const changed = logits.slice();
    for (const [token, count] of counts) changed[token] = change(changed[token], count);
    return changed;
  };
  const keepTopK = (logits, k) => (k >= logits.length ? logits : keepFrom(logits, descending(logits)[k - 1], k));
  const keepTopP = (logits, share) => {
    if (share >= 1) return logits;
    const ordered = descending(logits);
    let sum = 0, last = 0;
    const mass = ordered.map((value) => (sum += Math.exp(value - ordered[0])));
    const enough = share * sum;
    // The mass before each token decides, so that the token which crosses the border stays.
    while (last < mass.length - 1 && mass[last] < enough) last += 1;
    return keepFrom(logits, ordered[last], last + 1);
  };
  const keepMinP = (logits, share) => {
    const most = largest(logits);
    return logits.map((value) => (Math.exp(value - most) >= share ? value : MASKED));
  };
  const keepTypicalP = (logits, share) => {
    if (share >= 1) return logits;
    const shares = softmax(logits);
    const surprise = shares.map((value) => (value > 0 ? -Math.log(value) : 0));
    const entropy = shares.reduce((sum, value, token) => sum + value * surprise[token], 0);
    const distance = shares.map((value, token) => (value > 0 ? Math.abs(surprise[token] - entropy) : Infinity));
    // Infinity minus infinity is no order: compare.
    const order = [...distance.keys()].sort((a, b) => (distance[a] < distance[b] ? -1 : distance[a] > distance[b] ? 1 : a - b));
    const kept = new Float64Array(logits.length).fill(MASKED);
    let mass = 0;
    for (const [rank, token] of order.entries()) {
      if (rank && mass >= share) break;
      kept[token] = logits[token];
      mass += shares[token];
    }
    const most = largest(kept);
    return kept.map((value) => value - most);
  };
  const finite = (logits, fallback) => {
    const clean = logits.map((value) => (Number.isNaN(value) ? MASKED : Math.min(value, HUGE)));
    if (largest(clean) === MASKED) clean[fallback] = 0;
    return clean;
  };
  // One entry a filter: is it on, and what does it do with the logits, the options and the counts of the text.
  const FILTERS = {
    repetition_penalty: [
      ({ repetition_penalty: penalty }) => penalty && penalty !== 1,
      (logits, { repetition_penalty: penalty }, { text_counts: counts }) => counted(logits, counts, (value) =>
        (value > 0 ? Math.min(value / penalty, HUGE) : value * penalty)),
    ],
    presence_penalty: [
      ({ presence_penalty: presence, frequency_penalty: frequency }) => presence || frequency,
      (logits, { presence_penalty: presence = 0, frequency_penalty: frequency = 0 }, { generated_counts: counts }) =>
        counted(logits, counts, (value, count) => value - (presence + frequency * count)),
    ],
    temperature: [() => true, null],
    top_k: [({ top_k: k }) => k, (logits, { top_k: k }) => keepTopK(logits, k)],
    top_p: [({ top_p: share }) => share, (logits, { top_p: share }) => keepTopP(logits, share)],
    min_p: [({ min_p: share }) => share, (logits, { min_p: share }) => keepMinP(logits, share)],
    typical_p: [({ typical_p: share }) => share, (logits, { typical_p: share }) => keepTypicalP(logits, share)],
  };
  // The logits that the sampler draws from. `text` has banned, fallback, text_counts and generated_counts.
  const filtered = (raw, options, text) => {
    let logits = Float64Array.from(raw);
    for (const token of text.banned) logits[token] = MASKED;
    for (const [name, [isOn, apply]] of Object.entries(FILTERS)) {
      if (!isOn(options)) continue;
      if (name !== 'temperature') { logits = apply(logits, options, text); continue; }
      if (!Number.isFinite(largest(logits))) logits = finite(logits, text.fallback);
      const most = largest(logits), first = logits.indexOf(most);
      if (options.temperature === 0) return logits.map((_, token) => (token === first ? 0 : MASKED));
      logits = logits.map((value) => (value - most) / options.temperature);
    }
    return logits;
  };
  const probabilities = (raw, options, text) => softmax(filtered(raw, options, text));
  // The token that the number, from 0 to 1, falls on; tokens are in the order of their ids.
  const draw = (shares, number) => {
    const sum = shares.reduce((total, value) => total + value, 0);
    let mass = 0;
    return shares.findIndex((value) => (mass += value) > number * sum);
  };
  return { softmax, filtered, probabilities, draw, names: Object.keys(FILTERS) };
})();
