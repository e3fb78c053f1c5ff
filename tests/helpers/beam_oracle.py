"""Beam search as `beam_search` describes it, one prompt, float64 lists."""


def best_outputs(distribution, length, alpha, num_decodes):
  """The N best outputs, `(tokens, score)`, from the worst to the best.

  Args:
    distribution: a prefix's tokens to the log-probs of the next token.
    length: T.
    alpha: exponent of the brevity penalty.
    num_decodes: N.
  """
  live, finished = [((), 0.0)], []
  for size in range(1, length + 1):
    found = [
      (lp + step, (*prefix, v))
      for prefix, lp in live
      for v, step in enumerate(distribution(prefix))
    ]
    found = sorted(found, reverse=True)[: 2 * num_decodes]
    penalty = ((5 + size) / 6) ** alpha
    finished += [(lp / penalty, y) for lp, y in found if y[-1] == 1]
    finished = sorted(finished, reverse=True)[:num_decodes]
    live = [(y, lp) for lp, y in found if y[-1] != 1][:num_decodes]
  results = finished or [(lp, y) for y, lp in live]
  return [(y, s) for s, y in results[::-1]]
