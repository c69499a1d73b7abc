"""Evens out the rows of weights before they are quantized in groups: D2Quant's dual scales, absorbed."""

from __future__ import annotations

import numpy as np

from qgraph.passes.scale_channels import ScaleChannels, Site, Vector
from qgraph.passes.select_layers import DECISION
from qgraph.schemes import get_scheme
from qgraph.solvers import GROUP_FORMATS
from qgraph.solvers.dual_scale import channel_scales

DUAL_SCALES = "qgraph.dual_scales"  # key of model.meta: dict[str, float32 [K]], see ScaleChannels


class AbsorbDualScales(ScaleChannels):
    """x W = (x c) (W / c) with c [K] such that W / c loses less to a format with scales of groups: exact.

    D2Quant's DSQ (arXiv 2602.02546): see `qgraph.solvers.dual_scale` for how c is found. In the layer before,
    c multiplies columns, whose own scales of groups take it up: it costs no bit. The paper does so for down
    projections, which the elementwise product of a gated MLP lets it pass to. Here every layer gets a c where
    something takes it exactly (`ScaleChannels`): values on their way through attention, and the layers behind
    a norm, gain too. A GELU lets nothing pass.

    Layers that share an input share c. Behind a norm their outputs go separate ways, so there the relative
    error of every output counts the same; elsewhere, where the products are summed to a residual, the
    absolute.

    Args:
        scheme: of all layers that have none of their own.
        threads: None is one for every CPU; the result does not depend on it.

    Raises InputError for weights that are not finite, or beyond float16.
    """

    mark = DUAL_SCALES

    def __init__(self, scheme: str, *, threads: int | None = None) -> None:
        super().__init__()
        self.scheme = get_scheme(scheme).name
        self.threads = threads

    def strength(self, site: Site) -> Vector | None:
        """1 / c."""
        formats = {get_scheme(n.meta[DECISION].scheme or self.scheme).weight_format for n in site.nodes}
        if len(formats) > 1 or not formats <= set(GROUP_FORMATS):
            self.refuse(
                site.where, f"{site.shown}: no dual scales for {' and '.join(sorted(map(str, formats)))}"
            )
            return None
        if len(site.inputs) > 1:
            self.refuse(site.where, f"{site.shown}: no dual scales for several inputs at once")
            return None
        c = channel_scales(
            site.weights[0],
            str(*formats),
            channels=site.rows[0],
            count=site.channels,
            relative=site.source is None or not site.source.is_linear,
            name=site.inputs[0],
            threads=self.threads,
        )
        if (c == 1).all():
            self.refuse(site.where, f"{site.shown}: all weights are zero, or alike")
            return None
        self.refuse(site.where, f"{site.shown} multiplied by {c.min():.3g} to {c.max():.3g}")
        return np.float32(1) / c
