"""Bodies of requests and answers, with examples. Fields that are not declared are refused; ids are text."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recsys2stage.columns import YEAR_2100

MAX_ID = 1_024  # characters of an id

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Ids = Annotated[list[Id], Field(description="Ids as in the raw data, as text.")]
Time = Annotated[int, Field(ge=0, le=YEAR_2100, description="Seconds since 1970.")]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Body(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Filter(Body):
    """A condition on a declared item feature: any, all and none on classes, min and max on numbers."""

    any: list[str] | None = Field(default=None, description="Items with at least one of these classes.")
    all: list[str] | None = Field(default=None, description="Items with all of these classes.")
    none: list[str] | None = Field(default=None, description="Items without any of these classes.")
    min: float | None = Field(default=None, description="Items whose number is at least this.")
    max: float | None = Field(default=None, description="Items whose number is at most this.")

    @model_validator(mode="after")
    def _has_condition(self) -> "Filter":
        if all(value is None for value in (self.any, self.all, self.none, self.min, self.max)):
            raise ValueError("a filter is {}, expected any, all, none, min or max; add one, or leave the filter out")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"a filter has the min {self.min:g} above its max {self.max:g}, expected min <= max; swap")
        return self


class RawHistory(Body):
    """The events of a user, oldest first."""

    items: Ids
    times: list[Time] | None = Field(
        default=None, description="Of each event, ascending; needed by models that read times."
    )
    ratings: list[float | None] | None = Field(default=None, description="Of each event, null where it has none.")
    actions: list[str | None] | None = Field(
        default=None, description="Name of the action type of each event, or null."
    )

    @model_validator(mode="after")
    def _fits(self) -> "RawHistory":
        for name in ("times", "ratings", "actions"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.items):
                raise ValueError(
                    f"history.items has {len(self.items)} events but history.{name} has {len(values)}; give one for "
                    "each event"
                )
        for place, (one, other) in enumerate(zip(self.times or [], (self.times or [])[1:], strict=False), start=1):
            if other < one:
                raise ValueError(
                    f"history.times goes back from {one} (event {place}) to {other}, expected ascending times; send "
                    "the events oldest first"
                )
        return self


class UserPart(Body):
    """Whom a request is for: a known user, or a history."""

    user_id: Id | None = Field(default=None, description="A known user; or send a history.")
    history: RawHistory | None = Field(default=None, description="The events of any user; [] for one without events.")
    user: dict[str, Any] | None = Field(
        default=None,
        description="User features by declared name, with a history: a class, a list of classes or a number.",
    )
    request_time: Time | None = Field(
        default=None, description="Null: now, or the time of the newest event if that is later."
    )
    action: str | None = Field(default=None, max_length=MAX_ID, description="Target action, for models that have one.")
    explain: bool = Field(default=False, description="Whether each item gets the reasons of its score.")

    @model_validator(mode="after")
    def _one_user(self) -> "UserPart":
        if (self.user_id is None) == (self.history is None):
            given = "both user_id and history" if self.user_id is not None else "neither user_id nor history"
            raise ValueError(f"the request has {given}, expected exactly one of them; send a user_id or a history")
        if self.user is not None and self.history is None:
            raise ValueError("user is given with a user_id, expected with a history only; leave it out")
        return self


class Selection(Body):
    """Which items may be recommended."""

    exclude: Ids = Field(default=[], description="Items that may not.")
    allow: Ids | None = Field(default=None, description="The only items that may; null: all.")
    filters: dict[str, Filter] = Field(
        default={}, description="Conditions on declared item features, by name; all must be met."
    )


class RecommendRequest(UserPart, Selection):
    """A list of recommendations."""

    k: Count = Field(default=10, description="Number of items.")
    offset: int = Field(default=0, ge=0, le=1_000_000, description="Number of items to skip.")
    seen: Literal["keep", "filter"] | None = Field(
        default=None, description="Whether items of the history may be recommended; null: as the data were prepared."
    )
    diversity: float = Field(
        default=0.0, ge=0, le=1, description="Weight of dissimilarity to the items above (maximal marginal relevance)."
    )
    shown: Ids = Field(
        default=[], description="Items of earlier pages: not recommended again, and the list differs from them."
    )
    stages: bool = Field(default=False, description="Whether the retriever's own list is returned, too.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "1", "k": 5},
                {
                    "history": {"items": ["12", "7"], "times": [1046454000, 1046454590]},
                    "k": 5,
                    "diversity": 0.3,
                    "stages": True,
                    "explain": True,
                },
            ]
        }
    )


class RankRequest(UserPart):
    """Candidates to rank."""

    items: Annotated[Ids, Field(min_length=1)]

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "1", "items": ["12", "7", "30"]}]})


class BatchRequest(Body):
    """Several requests, answered together."""

    requests: list[RecommendRequest] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [{"user_id": "1", "k": 3}, {"user_id": "2", "k": 3}]}]}
    )


class SimilarRequest(Selection):
    """Items like one."""

    item_id: Id
    k: Count = 10

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_id": "12", "k": 5}]})


class NewEvent(Body):
    """An event that happened."""

    user_id: Id
    item_id: Id
    time: Time | None = Field(default=None, description="Null: now.")
    rating: float | None = Field(default=None, ge=-1e30, le=1e30)
    action: Annotated[str, Field(max_length=MAX_ID)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=80)] | None = Field(
        default=None, description="The request whose recommendations it follows."
    )


class EventsRequest(Body):
    """Events to keep."""

    events: list[NewEvent] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"events": [{"user_id": "1", "item_id": "12", "action": "click"}]}]}
    )


class Answer(BaseModel):
    """A part of an answer."""


class Reason(Answer):
    """The change of an item's score by a group of inputs, against their mean over the candidates."""

    signal: str
    effect: float


class Scored(Answer):
    """A recommended item."""

    item_id: str
    title: str | None
    score: float = Field(description="Of the last stage; of a list by popularity, the number of training events.")
    rank: int
    retriever_score: float | None
    retriever_rank: int | None = Field(description="Among the candidates; null: not a candidate.")
    reasons: list[Reason] | None = Field(default=None, description="Largest effect first; only with explain.")


class Retrieved(Answer):
    """An item of the retriever's list."""

    item_id: str
    title: str | None
    score: float
    rank: int


class Recommended(Answer):
    """A list of recommendations."""

    request_id: str
    bundle: str
    user_id: str | None
    known_events: int = Field(description="Events of items that the model knows.")
    request_time: int | None = Field(description="Null: the model does not read it.")
    fallback: Literal["popularity"] | None = Field(description="Set where nothing is known of the user.")
    items: list[Scored]
    retrieved: list[Retrieved] | None = None


class Ranked(Answer):
    """Candidates, ranked."""

    request_id: str
    bundle: str
    user_id: str | None
    known_events: int
    request_time: int | None
    fallback: Literal["popularity"] | None
    items: list[Scored]
    unknown: list[str] = Field(description="Candidates that the model does not know.")


class ProblemDetails(Answer):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[dict[str, Any]] = []


class BatchAnswer(Answer):
    """An answer or a problem for each request, in their order."""

    responses: list[Recommended | ProblemDetails]


class SimilarItem(Answer):
    """A similar item."""

    item_id: str
    title: str | None
    score: float = Field(description="Cosine of the retriever's vectors.")
    rank: int


class SimilarAnswer(Answer):
    """Items like one, best first."""

    request_id: str
    bundle: str
    item_id: str
    items: list[SimilarItem]


class Accepted(Answer):
    """Events that are on disk."""

    accepted: int
    unknown_items: int = Field(description="Of these, events of items that the model does not know; kept, too.")


class Item(Answer):
    """An item of the catalogue."""

    item_id: str
    title: str | None
    features: dict[str, Any]
    popularity: int = Field(description="Training events.")


class ItemsAnswer(Answer):
    """A page of items, the most popular first."""

    total: int
    items: list[Item]


class UsersAnswer(Answer):
    """A page of known users."""

    total: int
    users: list[str]


class UserEvent(Answer):
    """An event of a user."""

    item_id: str
    title: str | None
    time: int | None = Field(description="Null: the data have an order, but no times.")
    rating: float | None
    action: str | None
    source: Literal["data", "store"]


class UserAnswer(Answer):
    """A page of a user's events, newest first."""

    user_id: str
    events: list[UserEvent]
    total: int
