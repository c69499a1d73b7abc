"""Round to nearest in integer and ternary formats, the grid from each block's extremes alone: the baseline.

Symmetric formats map the largest magnitude to the highest level, the others a block's lowest and highest
weight to the ends of the grid. Ternary is PT2-LLM's initialization (arXiv 2510.03267; the threshold is that
of Ternary Weight Networks, arXiv 1605.04711): mu = mean w, v = w - mu, T = sign(v) where |v| > 0.75 mean|v|,
alpha = mean |v| over these.
"""

from __future__ import annotations
