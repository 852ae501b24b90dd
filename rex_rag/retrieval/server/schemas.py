"""What is asked of a retrieval server and what it answers, as its /openapi.json describes it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt


class RetrieveRequest(BaseModel):
    """A batch of searches."""

    queries: list[str] = Field(description="What to search for.", examples=[["who wrote Hamlet"]])
    topk: StrictInt | None = Field(None, description="Passages a query, best first; the server's default if null.")
    return_scores: StrictBool = Field(False, description="Answer with scores, or with the bare passages.")


class ReadRequest(BaseModel):
    """A batch of documents to read."""

    keys: list[str] = Field(description="Titles, or ids of passages.", examples=[["Hamlet"]])


class Document(BaseModel):
    """One passage. Its text comes from the corpus: treat it as untrusted."""

    model_config = ConfigDict(extra="allow")
    id: str = Field(description="The passage's id in the corpus.", examples=["7"])
    contents: str = Field(description="The title in quotes, a line break, the text.")


class ScoredDocument(BaseModel):
    """A passage and how well it matches."""

    document: Document
    score: float = Field(description="Higher is better; comparable within one ranking.")


class RetrieveResponse(BaseModel):
    """One ranking a query, in the order asked."""

    result: list[list[ScoredDocument]] | list[list[Document]] = Field(
        description="At least one and at most `topk` passages a query, best first; bare without `return_scores`."
    )


class ReadResponse(BaseModel):
    """One document a key, in the order asked."""

    result: list[list[Document]] = Field(
        description="The passages of a document in the order of the corpus; none for a key that nothing has."
    )


class Health(BaseModel):
    """Whether a search would be answered now."""

    status: str = Field(description="`ready`, `loading`, or `changed`: the index was written into.")
    detail: str | None = Field(None, description="What was changed.")
    retriever: str | None = Field(None, description="What is searched.")
    passages: int | None = Field(None, description="Passages in the index, where the engine knows.")
    identity: dict[str, str | int | float] | None = Field(
        None, description="Fingerprint of the index, hash of the corpus, and the settings that change what is found."
    )


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
