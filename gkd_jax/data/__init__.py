"""From seqio tasks to batches of numpy arrays.

batches: tasks by name, training batches with a position that can be saved.
identity: what a position belongs to: settings, fingerprints of the sources.
positions: a reader of one shard; its position counts rows.
shards: which shards of the data each process reads.
errors: those of seqio, TFDS and TensorFlow, as sentences.
feature_converters: seqio's: prompts alone, stored top-k log-probs, 0 as a token.
optional_targets: prompts alone, and mixtures with these.
vocabularies: what a task's vocabulary says of a model, and whether the two fit.
tokenizer_files: the tokenizer of a Hugging Face folder as a vocabulary.
tokenizer_folders: where checkpoints have their tokenizers.
chat: chat templates.
file_tasks: a task of a user's files, made from settings.
row_files: rows of JSONL, CSV, TSV and Parquet files.
row_texts: what a row asks and answers.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.data.batches import (
    SHIPPED_TASKS,
    CutInputs,
    TrainIterator,
    distilled_task,
    feature_converter,
    feature_lengths,
    has_split,
    load_task,
    tasks_with_split,
    try_saving,
  )
  from gkd_jax.data.file_tasks import task_of_files
  from gkd_jax.data.optional_targets import check as check_targets
  from gkd_jax.data.tokenizer_files import TokenizerVocabulary
  from gkd_jax.data.vocabularies import (
    fitted,
    special_tokens,
    target_vocabulary,
  )
