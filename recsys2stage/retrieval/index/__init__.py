"""Maximum inner product search over item vectors, with excluded items: `Exact`, `Approximate` (base class), `Faiss`,
`Auto` (one of them, by measured recall).

Row i of the (V, D) vectors is item i + 1; item 0 is padding and is never returned. Every index returns, for each query,
min(k, items not excluded) items with their exact inner products, sorted by score and then by item number; the rest of
the row is item -1 with score -inf.

To add an approximate index, subclass `Approximate` and implement `candidates` (and `_prepare`, `_write`, `_read` for
data besides the vectors), and `allowed_candidates` if it can leave out items while it searches. Rows for which it
returns too few items are completed by exact search.
"""

from recsys2stage.retrieval.index.approximate import Approximate as Approximate
from recsys2stage.retrieval.index.auto import Auto as Auto
from recsys2stage.retrieval.index.base import DESCRIPTION as DESCRIPTION
from recsys2stage.retrieval.index.base import VECTORS as VECTORS
from recsys2stage.retrieval.index.base import Index as Index
from recsys2stage.retrieval.index.exact import Exact as Exact
from recsys2stage.retrieval.index.faiss_index import Faiss as Faiss
from recsys2stage.retrieval.index.recall import measure as measure
from recsys2stage.retrieval.index.recall import recall_of as recall_of
from recsys2stage.retrieval.index.rows import Exclude as Exclude
from recsys2stage.retrieval.index.rows import SearchResult as SearchResult
