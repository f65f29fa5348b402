"""Checkpoints of a run: their contents (``state``), writing (``writer``), resuming (``resume``), and choosing the best
one (``best``).

    checkpoints/
      step-00012345/
        model.safetensors       a model file, as any other tool reads it
        optimizer.safetensors   exp_avg.<parameter>, exp_avg_sq.<parameter> of the trained parameters
        state.json              what else the run knows, and the sha256 of the other files; written last
      best.json                 step, set and top-1 of the best epoch end on the held-out set
      .step-00012399.4711       being written, or being removed

No random state is saved: sample order, masks and donors are functions of (seed, epoch, step, lane).
"""
