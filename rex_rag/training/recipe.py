"""What a training recipe is made of."""

from __future__ import annotations

from trl import ModelConfig

from rex_rag.data.qa import QuestionArguments
from rex_rag.evaluation.during_training import EvaluationSetArguments
from rex_rag.retrieval.load import RetrieverArguments
from rex_rag.training.config import REXRAGConfig

# In the order in which `TrlParser` gives them back: training questions, evaluation, retrieval, method, model.
RECIPE_PARTS = (QuestionArguments, EvaluationSetArguments, RetrieverArguments, REXRAGConfig, ModelConfig)
