"""Where tokens lie: indexed files, windows over them, tables and text, and the way from text to tokens."""

from penstock._core.documents import document_mask
from penstock.data_pipeline.datasets.collate import IGNORED, TokenCollator
from penstock.data_pipeline.datasets.corpora import Corpora
from penstock.data_pipeline.datasets.indexed import IndexedDataset
from penstock.data_pipeline.datasets.indexed_builder import IndexedDatasetBuilder
from penstock.data_pipeline.datasets.open import open_dataset
from penstock.data_pipeline.datasets.packing import PackedDocuments, cumulative_lengths, document_mask_mod
from penstock.data_pipeline.datasets.python_corpus import SourceFile, read_sources, standard_library_files
from penstock.data_pipeline.datasets.rearrange import merge_indexed, split_indexed
from penstock.data_pipeline.datasets.text import read_texts, text_files
from penstock.data_pipeline.datasets.windows import TokenWindows

__all__ = [
    "IGNORED",
    "Corpora",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "PackedDocuments",
    "SourceFile",
    "TokenCollator",
    "TokenWindows",
    "cumulative_lengths",
    "document_mask",
    "document_mask_mod",
    "merge_indexed",
    "open_dataset",
    "read_sources",
    "read_texts",
    "split_indexed",
    "standard_library_files",
    "text_files",
]
