"""`qgraph inspect`: what a file holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options
from qgraph.report.text import size


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@standard_options
def command(file: Path, as_json: bool) -> None:
    """Show what FILE holds: an artifact (.qg; its hashes are checked, its code is not run) or an ONNX
    model."""
    found = _artifact(file) if file.suffix == ".qg" else _onnx(file)
    if as_json:
        print_json(found)
        return
    print(table([(key, _text(key, value)) for key, value in found.items() if not isinstance(value, list)]))
    for key, value in found.items():
        if isinstance(value, list) and value:
            print(f"\n{key}")
            columns = [
                key for key in _keys(value) if any(row.get(key) not in ("", None, 0.0) for row in value)
            ]
            print(table([[_cell(row.get(key)) for key in columns] for row in value], columns))


def _artifact(path: Path) -> dict[str, Any]:
    from qgraph.report.artifact import read_artifact

    info = read_artifact(path)
    return {
        "nbytes": info.nbytes,
        "weight_nbytes": info.weight_bytes,
        **dict(sorted(info.metadata.items())),
        # Anybody can write a key there: `verify` says whether it signed the file.
        **({"signature": f"of key {info.signer.hex()}, not verified"} if info.seal else {}),
        "inputs": info.tensors_of("inputs"),
        "outputs": info.tensors_of("outputs"),
        "dims": info.plan["dims"],
        "code": [
            {
                "isa": v["isa"],
                "arch": v["arch"],
                "nbytes": info.tensors[v["code"]][2],
                "features": " ".join(v["features"]),
            }
            for v in info.variants
        ],
        "kernels": [
            {**({"device": device} if len(info.plans) > 1 else {}), "kernel": name, "steps": count}
            for device in info.plans
            for name, count in info.kernels(device).most_common()
        ],
    }


def _onnx(path: Path) -> dict[str, Any]:
    from qgraph.passes import load_model
    from qgraph.passes.select_layers import module_scopes
    from qgraph.report import layers_of

    model = load_model(path)
    graph = model.graph
    weights = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    modules = {str(node.name): (module_scopes(node) or [""])[-1] for node in graph.all_nodes()}
    operators = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.all_nodes())
    return {
        "nbytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".strip(),
        **{f"opset {domain or 'ai.onnx'}": version for domain, version in model.opset_imports.items()},
        **dict(sorted(model.metadata_props.items())),
        "weight_nbytes": sum(w.nbytes for w in weights),
        "inputs": [_value(v) for v in graph.inputs],
        "outputs": [_value(v) for v in graph.outputs],
        "operators": [{"operator": name, "nodes": count} for name, count in operators.most_common()],
        "layers": [
            {"module": modules[layer.name]}
            | {k: v for k, v in layer.to_json().items() if k not in ("kernel", "compute")}
            for layer in layers_of(model)
        ],
    }


def _value(value: Any) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return {"name": value.name, "dtype": None if value.dtype is None else str(value.dtype), "shape": shape}


def _keys(rows: list[dict[str, Any]]) -> dict[str, None]:
    """Those that some row has, in order."""
    return dict.fromkeys(key for row in rows for key in row)


def _text(key: str, value: Any) -> str:
    return size(value) if key.endswith("nbytes") else str(value)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    return "" if value is None else str(value)
