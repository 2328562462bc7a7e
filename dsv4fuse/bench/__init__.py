"""What is measured: single fusions, whole models, and what the kernels compile to.

``fusions`` and ``models`` time on a GPU, ``kernels`` compiles for one that need not be here;
``command`` is the command line in front of them.
"""
