"""Shared names: table columns, files of a prepared dataset, reserved item numbers and feature values."""

PAD = 0  # item 0 is padding; real items are numbered 1..V
MASK = -1  # item number of a masked event
UNKNOWN = 0  # feature value 0 is "unknown"; real values are numbered from 1
PLAIN_NUMBER = r"^(0|-?[1-9]\d{0,19})$"  # ids become integers if all match and fit in 64 bits; 007 stays text

# columns of events, items and users as a Source yields them
USER_ID, ITEM_ID, TIME, RATING, ACTION, TITLE = "user_id", "item_id", "time", "rating", "action", "title"
PART = "part"  # an event's split, if the source has one: index into train, val, test

# columns of tables after numbering: users 0..U-1, items 1..V
USER, ITEM, SCORE, RANK = "user", "item", "score", "rank"
REQUEST, PLACE, ROWS = "request", "place", "rows"  # a mined list, event index of its target, its length
LABEL, RETRIEVER_SCORE, RETRIEVER_RANK, ORIGIN, FOLD = "label", "retriever_score", "retriever_rank", "origin", "fold"

YEAR_2100 = 4_102_444_800  # seconds since 1970; the latest valid time

MANIFEST = "manifest.json"  # in every artifact: its kind, options, parents and versions
CARD = "README.md"  # model card of a bundle or an index; no checksum: evaluations and users edit it

# files of a prepared dataset; E events sorted by user and time, U users, V items
EVENT_ITEMS = "events.item.npy"  # (E,) int32
EVENT_TIMES = "events.time.npy"  # (E,) int64, seconds since 1970 or, without real time, the index in the log
EVENT_RATINGS = "events.rating.npy"  # (E,) float32, where the source has ratings
EVENT_ACTIONS = "events.action.npy"  # (E,) int32, where the source has actions
USER_OFFSETS = "users.offsets.npy"  # (U + 1,) int64: user u owns events [offsets[u], offsets[u + 1])
TRAIN_ENDS = "users.train_end.npy"  # (U,) int64: events [offsets[u], train_end[u]) are for training
VAL_ENDS = "users.val_end.npy"  # (U,) int64: [train_end, val_end) for validation, [val_end, offsets[u + 1]) for test
VAL_TARGETS = "targets.val.npy"  # (n,) int64, event indices; only where the split has several targets per user
TEST_TARGETS = "targets.test.npy"  # (m,) int64, likewise
ITEM_COLD = "items.cold.npy"  # (V + 1,) bool: withheld from all training
ITEM_TABLE = "items.parquet"  # item, item_id, title and features as in the source
USER_TABLE = "users.parquet"  # user, user_id and features as in the source
REJECTED = "rejected.parquet"  # rows removed by on_bad_rows: quarantine, each with its reason
