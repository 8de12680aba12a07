# models and their anatomy
from .model import Model as Model, load as load
from .anatomy import Anatomy as Anatomy, Slice as Slice
from .hooks import record as record, rewrite as rewrite

# nouns
from .heads import Circuit as Circuit, Head as Head, HeadScores as HeadScores
from .tasks import LabelledTask as LabelledTask, PairedTask as PairedTask
from .fewshot import FewShotTask as FewShotTask
from .rules import rule_task as rule_task
from .encoding import Encoded as Encoded, Evaluation as Evaluation, evaluate as evaluate

# methods
from .cdt import Node as Node, decompose as decompose, relevance as relevance
from .sources import SourceScores as SourceScores, source_relevance as source_relevance
from .discovery import discover as discover
from .head_graph import HeadGraph as HeadGraph, head_to_head as head_to_head
from .gates import learned_gates as learned_gates
from .judge import compare_methods as compare_methods, cpr_cmd as cpr_cmd
from .interchange import read_circuit as read_circuit, write_mib as write_mib
from .means import mean_activations as mean_activations
from .attribution import ablation as ablation, gradient as gradient, integrated_gradients as integrated_gradients
from .token_effects import TokenRelevance as TokenRelevance, token_relevance as token_relevance
from .faithful import FaithfulnessCurve as FaithfulnessCurve, faithfulness as faithfulness
from .embedding import TaskEmbedding as TaskEmbedding, task_embedding as task_embedding
from .selection import HeadSelection as HeadSelection, select_heads as select_heads
from .alphas import AlphaCurve as AlphaCurve, alpha_curve as alpha_curve
from .transfer import TransferMatrix as TransferMatrix, transfer_matrix as transfer_matrix
from .head_effects import indirect_effect as indirect_effect, leave_one_out as leave_one_out, slope as slope
from .answers import AnswerScores as AnswerScores, score_answers as score_answers
from .roles import HeadRoles as HeadRoles, head_roles as head_roles, null_selections as null_selections
from .interference import Overlap as Overlap, overlap as overlap
from .measurement import Interference as Interference, measure_interference as measure_interference
from .measurement import pairwise_interference as pairwise_interference, trajectory as trajectory
