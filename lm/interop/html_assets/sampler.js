// Draws tokens as lm/generation does: the same seed gives the same random numbers.

const MASK = (1n << 64n) - 1n;

// The random number in [0, 1) of a position of the first sample with this seed. Source: Salmon et al. 2011, Philox 4x64.
function uniform(seed, position) {
  let [a, b, c, d] = [BigInt(position) + 1n, 0n, 0n, 0n], [k, l] = [BigInt(seed), 0n];
  for (let round = 0; round < 10; round++) {
    const first = 0xd2e7470ee14c6c93n * a, second = 0xca5a826395121157n * c;
    [a, b, c, d] = [(second >> 64n) ^ b ^ k, second & MASK, (first >> 64n) ^ d ^ l, first & MASK];
    k = (k + 0x9e3779b97f4a7c15n) & MASK;
    l = (l + 0xbb67ae8584caa73bn) & MASK;
  }
  return Number(a >> 11n) / 2 ** 53;
}

// Keeps the `count` largest logits, of which the smallest is `border`; among equals the lower ids stay.
function keepFrom(logits, border, count) {
  let room = count;
  for (const logit of logits) if (logit > border) room--;
  return logits.map((logit) => (logit > border || (logit === border && room-- > 0) ? logit : -Infinity));
}

const falling = (logits) => logits.slice().sort().reverse();

function keepTopK(logits, k) {
  return k >= logits.length ? logits : keepFrom(logits, falling(logits)[k - 1], k);
}

function keepTopP(logits, p) {
  const ordered = falling(logits), mass = [];
  let sum = 0;
  for (const logit of ordered) mass.push((sum += Math.exp(logit - ordered[0])));
  let last = mass.findIndex((value) => value >= p * sum);
  if (last < 0) last = mass.length - 1;
  return keepFrom(logits, ordered[last], last + 1);
}

function keepMinP(logits, p) {
  return logits.map((logit) => (Math.exp(logit) >= p ? logit : -Infinity));
}

function largest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

// The logits (V) that a token is drawn with: the largest is 0, and masked tokens are -Infinity.
function filtered(logits, { temperature, topK, topP, minP }, unknown) {
  let kept = Float64Array.from(logits);
  if (unknown !== null) kept[unknown] = -Infinity;
  const best = largest(kept), most = kept[best];
  if (temperature === 0) return kept.map((_, id) => (id === best ? 0 : -Infinity));
  kept = kept.map((logit) => (logit - most) / temperature);
  if (topK) kept = keepTopK(kept, topK);
  if (topP && topP < 1) kept = keepTopP(kept, topP);
  if (minP) kept = keepMinP(kept, minP);
  return kept;
}

// The token at which the cumulative weight of filtered logits passes this share.
function draw(kept, share) {
  const sums = new Float64Array(kept.length);
  let sum = 0;
  for (let id = 0; id < kept.length; id++) sums[id] = sum += Math.exp(kept[id]);
  const threshold = share * sum;
  let low = 0, high = sums.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sums[middle] <= threshold) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Natural logarithm of the probability of a token under logits.
function logProbability(logits, token) {
  let most = -Infinity, sum = 0;
  for (const logit of logits) if (logit > most) most = logit;
  for (const logit of logits) sum += Math.exp(logit - most);
  return logits[token] - most - Math.log(sum);
}
