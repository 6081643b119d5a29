"""MetaFormer: where and when as evidence."""
