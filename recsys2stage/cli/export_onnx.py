"""The command export-onnx: the stages of a bundle as ONNX files, which run without this package."""

from pathlib import Path

import numpy as np

from recsys2stage import columns as c
from recsys2stage.artifacts import RUN, atomic_write, checksums, write_manifest
from recsys2stage.data.locks import locked
from recsys2stage.data.summary import print_summary
from recsys2stage.ranking.bundle import POPULARITY
from recsys2stage.recommender import Recommender
from recsys2stage.serving.onnx_files import ITEM_VECTORS, OPSET, CannotExport, check_packages, versions, write_graphs
from recsys2stage.trust import Trust

KIND = "onnx"  # of the folder, in its manifest


def export_onnx(bundle: Path = RUN / "bundle", output: Path | None = None, trust: Trust = None) -> None:
    """Export a bundle as ONNX files, for serving without Python or without this package.

    retriever.onnx computes query vectors of histories, ranker.onnx the scores of candidates, with any batch size and
    length. The folder also has the item vectors, item ids, item popularity, and a manifest that names inputs and
    outputs. Each file is compared with the model in onnxruntime; nothing is written if one cannot be exported or
    differs.

    Args:
        bundle: folder written by export-bundle, or by export-index (first stage only).
        output: folder to write; None: onnx, next to the bundle.
        trust: modules outside this package from which the bundle may load classes.
    """
    recommender, output = Recommender.load(bundle, trust), output or bundle.parent / "onnx"
    check_packages()
    with locked(output), atomic_write(output, KIND) as folder:
        folder.mkdir()
        try:
            graphs = write_graphs(recommender, folder)
        except CannotExport as error:
            raise ValueError(
                f"{bundle}: {error}; nothing is written, serve this model with recsys serve, or train another"
            ) from error
        np.save(folder / ITEM_VECTORS, recommender.vectors[1:])
        for name in (c.ITEM_TABLE, POPULARITY):
            (folder / name).write_bytes((bundle / name).read_bytes())
        write_manifest(
            folder,
            KIND,
            options={},
            parents={"bundle": bundle},
            opset=OPSET,
            packages=versions(),
            graphs=graphs,
            max_length=recommender.towers.max_length,
            items=len(recommender.vectors) - 1,
            vector_dim=recommender.vectors.shape[1],
            similarity=recommender.towers.similarity,
            request_time=recommender.request_time,
            next_action=recommender.next_action,
            actions=recommender.actions,
            user_features=recommender.user_features if recommender.reads_user else [],
            candidates=None if recommender.reranker is None else recommender.num_candidates,
            recent=recommender.recent,
            signals=[signal["name"] for signal in recommender.signal_names],
            files=checksums(folder),
        )
    differences = [shape["difference"] for graph in graphs.values() for shape in graph["checked"]]
    print_summary(
        output,
        f"{' and '.join(graph['file'] for graph in graphs.values())}, opset {OPSET}",
        *(
            f"{name}: {', '.join(port['name'] for port in graph['inputs'])} → {graph['outputs'][0]['name']}"
            for name, graph in graphs.items()
        ),
        f"largest difference from torch {max(differences):.1g}, at {len(differences)} shapes",
        then=f"recsys serve --bundle {bundle}",
    )
