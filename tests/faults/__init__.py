"""What a caller gets when vLLM or Milvus fails: the table, and tests that show every row of it.

- ``table``: the rows as data; ``render`` writes them into docs/what-happens.md.
- ``servers``: servers that refuse, hang, break off; Milvus as a process that can be killed.
- ``callers``: both front ends behind one interface, and the check of what came back.
"""
