"""The commands other than fit, validate and test, by name."""

from typing import Any

from recsys2stage.cli.embed_items import embed_items
from recsys2stage.cli.evaluate import evaluate
from recsys2stage.cli.export import export_bundle, export_index
from recsys2stage.cli.export_onnx import export_onnx
from recsys2stage.cli.listing import list_parts
from recsys2stage.cli.project import init
from recsys2stage.cli.recommend import recommend
from recsys2stage.cli.serve import export_log, serve
from recsys2stage.cli.tune import tune
from recsys2stage.data.prepare import prepare
from recsys2stage.data.simulate import simulate
from recsys2stage.mining.mine import mine_negatives

COMMANDS: dict[str, Any] = {
    "init": init,
    "list": list_parts,
    "simulate": simulate,
    "prepare-data": prepare,
    "embed-items": embed_items,
    "tune": tune,
    "export-index": export_index,
    "mine-negatives": mine_negatives,
    "export-bundle": export_bundle,
    "export-onnx": export_onnx,
    "recommend": recommend,
    "evaluate": evaluate,
    "serve": serve,
    "export-log": export_log,
}
