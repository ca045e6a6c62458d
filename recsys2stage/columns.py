"""Names that every stage shares: columns of tables, files of a prepared dataset, the padding item."""

PAD = 0  # item 0 is padding; real items are numbered 1..V
MASK = -1  # an event that is hidden from the model
UNKNOWN = 0  # feature value 0 is "not known"; real values are numbered from 1
PLAIN_NUMBER = r"^(0|-?[1-9]\d{0,19})$"  # if all ids are such text and 64 bits hold them, they are numbers; 007 is text

# columns of events, items and users as a Source yields them
USER_ID, ITEM_ID, TIME, RATING, ACTION, TITLE = "user_id", "item_id", "time", "rating", "action", "title"
PART = "part"  # what an event is for, where the source says so: its place in train, val, test

# columns of tables after numbering: users 0..U-1, items 1..V
USER, ITEM, SCORE, RANK = "user", "item", "score", "rank"
REQUEST, PLACE, ROWS = "request", "place", "rows"  # a mined list, its target among all events, its length
LABEL, RETRIEVER_SCORE, RETRIEVER_RANK, ORIGIN, FOLD = "label", "retriever_score", "retriever_rank", "origin", "fold"

MANIFEST = "manifest.json"  # beside every artifact: what made it, from what, with which options

# files of a prepared dataset; E events sorted by user and time, U users, V items
EVENT_ITEMS = "events.item.npy"  # (E,) int32
EVENT_TIMES = "events.time.npy"  # (E,) int64, seconds since 1970 or, without real time, the place in the log
EVENT_RATINGS = "events.rating.npy"  # (E,) float32, where the source has ratings
EVENT_ACTIONS = "events.action.npy"  # (E,) int32, where the source has actions
USER_OFFSETS = "users.offsets.npy"  # (U + 1,) int64: user u owns events [offsets[u], offsets[u + 1])
TRAIN_ENDS = "users.train_end.npy"  # (U,) int64: events [offsets[u], train_end[u]) are for training
VAL_ENDS = "users.val_end.npy"  # (U,) int64: [train_end, val_end) validate, [val_end, offsets[u + 1]) test
ITEM_COLD = "items.cold.npy"  # (V + 1,) bool: withheld from all training
ITEM_TABLE = "items.parquet"  # item, item_id, title and features as the source gave them
USER_TABLE = "users.parquet"  # user, user_id and features as the source gave them
REJECTED = "rejected.parquet"  # rows put aside by on_bad_rows: quarantine, each with its reason
