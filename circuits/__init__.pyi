# models and their anatomy
from .anatomy import Anatomy as Anatomy
from .anatomy import Slice as Slice
from .attribution import ablation as ablation
from .attribution import gradient as gradient
from .attribution import integrated_gradients as integrated_gradients

# methods
from .cdt import Node as Node
from .cdt import decompose as decompose
from .cdt import discover as discover
from .cdt import relevance as relevance
from .embedding import select_heads as select_heads
from .embedding import task_embedding as task_embedding
from .faithful import FaithfulnessCurve as FaithfulnessCurve
from .faithful import faithfulness as faithfulness
from .fewshot import FewShotTask as FewShotTask

# nouns
from .heads import Circuit as Circuit
from .heads import Head as Head
from .heads import HeadScores as HeadScores
from .hooks import record as record
from .hooks import rewrite as rewrite
from .interference import measure_interference as measure_interference
from .model import Model as Model
from .model import load as load
from .tasks import Encoded as Encoded
from .tasks import Evaluation as Evaluation
from .tasks import LabelledTask as LabelledTask
from .tasks import PairedTask as PairedTask
from .tasks import evaluate as evaluate
