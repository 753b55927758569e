"""Fields that a perplexity report and a comparison share, each declared once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Split = Annotated[str, Field(description="Split of the text; text for a text from elsewhere.")]
TextHash = Annotated[str, Field(description="Hash of the UTF-8 text that was scored.")]
Tokens = Annotated[int, Field(description="Number of scored tokens: all of the split, or those of its answers.")]
UnknownTokens = Annotated[int, Field(description="Number of unknown tokens.")]
Lines = Annotated[int, Field(description="Number of newlines.")]
Characters = Annotated[int, Field(description="Number of Unicode characters of the original text.")]
Bytes = Annotated[int, Field(description="Number of UTF-8 bytes of the original text.")]
Context = Annotated[str, Field(description="Which earlier tokens each prediction used.")]
Precision = Annotated[str, Field(description="Number format of the matrix products.")]
Version = Annotated[str, Field(description="Version of Inkling.")]
