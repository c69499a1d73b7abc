"""Evens out the rows of weights before they are quantized in groups: D2Quant's dual scales, absorbed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import is_op
from qgraph.passes.scale_channels import ScaleChannels, Site, Vector
from qgraph.passes.select_layers import DECISION
from qgraph.schemes import get_scheme
from qgraph.solvers import GROUP_NAMES
from qgraph.solvers.dual_scale import channel_scales

DUAL_SCALES = "qgraph.dual_scales"  # key of model.meta: dict[str, float32 [K]], see ScaleChannels


class AbsorbDualScales(ScaleChannels):
    """x W = (x c) (W / c) with c [K] such that W / c loses less to a format with scales of groups: exact.

    D2Quant's DSQ (arXiv 2602.02546): see `qgraph.solvers.dual_scale` for how c is found. In the layer before,
    c multiplies columns, whose own scales of groups take it up: it costs no bit. The paper does so for down
    projections, which the elementwise product of a gated MLP lets it pass to. The layer that values pass to
    through attention gains as much, and gets a c here, too. So do others that a linear layer or a product
    with a vector reaches (`ScaleChannels`); a GELU lets nothing pass.

    Layers behind a norm are left alone: though each of them loses up to a tenth less, models do not.

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

    def _format(self, node: ir.Node) -> str:
        return str(get_scheme(node.meta[DECISION].scheme or self.scheme).weight_format)

    def strength(self, site: Site) -> Vector | None:
        """1 / c."""
        format, *others = sorted({self._format(node) for node in site.nodes})
        if others or format not in GROUP_NAMES:
            self.refuse(site.where, f"{site.shown}: no dual scales for {' and '.join([format, *others])}")
            return None
        if site.source is not None and is_op(site.source.node, "LayerNormalization", "RMSNormalization"):
            self.refuse(site.where, f"{site.shown}: no dual scales behind a norm, where they gain nothing")
            return None
        if len(site.inputs) > 1:
            self.refuse(site.where, f"{site.shown}: no dual scales for several inputs at once")
            return None
        c = channel_scales(
            site.weights[0],
            format,
            channels=site.rows[0],
            count=site.channels,
            name=site.inputs[0],
            threads=self.threads,
        )
        if (c == 1).all():
            self.refuse(site.where, f"{site.shown}: all weights are zero, or alike")
            return None
        self.refuse(site.where, f"{site.shown} multiplied by {c.min():.3g} to {c.max():.3g}")
        return np.float32(1) / c
