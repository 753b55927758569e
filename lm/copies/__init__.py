"""Which parts of a text stand word for word in another text: an exact index of the training text.

    index = CopyIndex("the training text …")
    copies = index.find("a sample")
    copies.longest.length, copies.share(20), copies.spans(20)

`index` has the suffix array and its search, `copies` what was found, `figures` the shares of several texts together.
Lengths and positions are characters (Unicode code points). Nothing here needs torch.
"""

from __future__ import annotations

from lm.copies.copies import CopiedRun, Copies
from lm.copies.figures import LENGTHS, CopyFigures, figures_of
from lm.copies.index import CopyIndex

__all__ = ["LENGTHS", "CopiedRun", "Copies", "CopyFigures", "CopyIndex", "figures_of"]
