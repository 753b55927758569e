"""Looking inside a model: gradients through time, attention, neurons, shares of a prediction, shapes.

One view a file. A view asks a model for its parts (`LanguageModel.inspect`) and returns plain arrays in a frozen
dataclass; `lm.inspection.drawing` draws them. In Python the room is `lm.inspect`:

    import lm

    run = lm.load("input-gru-char")
    found = lm.inspect.neurons(run, text)
    for ranking in found.rankings:
        print(ranking.feature, [unit for unit in ranking.units if unit.named])

The functions have the names of their files, so import the other names with `from lm.inspection.FILE import NAME`.
"""

from lm.inspection.attention import attention
from lm.inspection.gradients import gradients
from lm.inspection.neurons import neurons
from lm.inspection.shapes import shapes
from lm.inspection.subject import fresh, subject, untrained
from lm.inspection.why import why

__all__ = ["attention", "fresh", "gradients", "neurons", "shapes", "subject", "untrained", "why"]
