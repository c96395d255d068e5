"""Each prefix of a search's pipelines is fitted once, in searches that know nothing of it.

A search calls one function of scikit-learn for every candidate and fold: set the candidate's parameters, cut the fold
out of X and y, fit, score. We run that very function, with three things of ours in it (``task.py``):

- it cuts the fold through us, so a fold is cut once;
- the pipeline's transformers answer ``fit_transform`` and ``transform`` by a result that is on the call's shelf
  (``data/shelf.py``) if there is one, or else put theirs there; all other code of the pipeline is scikit-learn's own;
- it writes tracebacks without our lines.

::

    calling thread                                    where a task runs
    SharedFits.add: identities of its steps           SharedFit: scikit-learn's function, with a Sharer
    Ledger: which tasks have which in common           Sharer: the step's own method, or what lies on the shelf
    SharedFits.wrap: the task with what it shares      result and counts, told apart again by SharedFits.finish

Identity (``steps.py``). A fold is the content of X, y, indices, fit parameters and scikit-learn's configuration; a
fitted step is its class, all its attributes, and the data that it was fitted on; data is a fold, or what a fitted step
made of data. So nothing that was computed is hashed to be found, and equal values share, whoever made them. What flows
through a pipeline is followed by object: a step that gets anything else than the known data runs as if it were alone.

What is on the shelf (``effects.py``) is what fit has set, what it returned and what it warned of. Everyone who takes it
has copies, also of the data: no candidate reaches another. A step of which a copy would not do (it changes its input,
or draws random numbers unseen) is found out when it first runs, and is not shared.

All that is known of scikit-learn's inside is in ``sklearn_inside.py``.
"""
