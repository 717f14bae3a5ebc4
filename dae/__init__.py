"""Disruptive Autoencoders (Valanarasu et al., MIDL 2024) in plain PyTorch.

Read the files in this order; each imports only what stands above it.

THE METHOD: what an auditor reads, with train_pretrain.py at its end

    quiet.py                     threads that wait for work soon sleep
    errors.py                    the one error that a user can mend
    config/command_line.py       a frozen dataclass in, a command line out
    config/shared.py             options of the network, the data, the optimiser and the run
    config/pretrain.py           options of pre-training, and its presets

    model/conv.py                residual convolutions and instance norm
    model/swin.py                windows, shifts, position bias, attention, patch merging, encoder
    model/unetr.py               Swin UNETR in three visible stages: tokenize, encode, decode
    model/unet.py                a port: a residual U-Net, convolutions alone
    model/vit.py                 a port: UNETR on timm's transformer blocks
    model/__init__.py            BACKBONES: name -> class, and what a backbone must offer
    model/probe.py               a frozen encoder and a linear head, for fine-tuning

    pretext/disrupt.py           eq. 1 noise, eq. 2 downsampling, local masking, token masking
    pretext/contrast.py          eq. 3 and 4: cross-modal contrastive learning
    pretext/distil.py            teacher and student: self-distillation, beyond the paper
    pretext/methods.py           METHODS: Table 5 as a table, and `forward`, which is Figure 1
    pretext/views.py             what a baseline does to a crop: augment, turn, cut out
    pretext/baselines.py         the other rows of Table 4, what DAE is compared with

AROUND IT: what a run needs

    files.py                     files that appear whole or not at all
    boxes.py                     the box of a mask
    config/evaluate.py           options of eval.py
    config/segment.py            options of fine-tuning, and its presets
    config/lists.py              options of the command that writes a data list
    config/illustrate.py         options of the paper's pictures
    config/study.py              options of a study
    config/check.py              options of the check of data lists

  what it sees
    data/nifti.py                volumes, their grids, and what is wrong with a file
    data/listfile.py             a JSON file that a person wrote
    data/nnunet.py               an nnU-Net raw folder as the content of a list
    data/regions.py              regions: unions of labels that may overlap
    data/datalist.py             the list: which volumes there are, and what each is
    data/leaks.py                nobody is on both sides of a split
    data/holdout.py              which of them train, and which are held out
    data/datasets.py             the data sets of sec. 3.1 as a table
    data/patterns.py             the images of a folder whose paths fit a pattern
    data/make_list.py            the command: a data list from a folder and a pattern of names
    data/sides.py                left and right in the names of classes, and the flips that are safe
    data/preprocess.py           spacing, intensity, foreground
    data/cache.py                each volume prepared once, shared by all ranks
    data/augment.py              crops and augmentations
    data/batches.py              (seed, step, j) -> sample
    demo/anatomy.py              a torso and a head as tables of ellipsoids
    demo/phantom.py              synthetic CT and MR volumes made from them
    demo/__init__.py             the demo's data, made where it is not there yet
    demo/hard.py                 bodies in which brightness alone does not tell organs apart
    demo/__main__.py             the command that writes them

  weights
    weights/checkpoint.py        all of a run in one file, sealed with a checksum
    weights/transfer.py          tensors of one network into another with a new head
    weights/plan.py              how a network of given weights is built and fed
    weights/layouts.py           names of tensors in each kind of file
    weights/foreign.py           any file of weights: its tensors by our names, and its plan
    weights/__main__.py          the command: inspect, convert

  how it is run
    figures.py                   every picture: reconstructions, curves, overlays, distributions
    training/distributed.py      ranks, and the stop signal
    training/precision.py        bf16, fp16 or neither
    training/kernels.py          layout, kernel search and TF32 of each device
    training/optim.py            AdamW and the learning rate
    training/losses.py           losses of fine-tuning
    training/log.py              log.jsonl, the progress line, and the speed of a run
    training/resume.py           the folder of a run, and whether a resumed run is the same run
    training/run.py              what pre-training and fine-tuning do alike around their loops
    training/reconstruction.py   validation of pre-training: fixed crops

  how good it is
    evaluation/nearest.py        from each voxel of a border to the nearest of another
    evaluation/metrics.py        Dice, HD, MSD, HD95, NSD in mm
    evaluation/statistics.py     averages, paired tests, intervals, fold tables
    evaluation/written.py        what eval.py wrote into a folder, and what it may write there
    evaluation/cases.py          predictions against labels, file by file
    evaluation/windows.py        sliding window, flips, ensembles
    evaluation/native_grid.py    back to the patient's own grid and file
    evaluation/ahead.py          the next case is read while this one is predicted
    evaluation/validation.py     Dice over whole volumes, while training
    evaluation/postprocess.py    components, holes, smoothing; chosen on validation cases
    evaluation/report.py         CSV, JSON, one HTML page (page.html)
    evaluation/features.py       the states of an encoder on fixed crops, and what they tell
    evaluation/cka.py            Table 7: how alike the states of two networks are

  what it looks like
    illustrate.py                the command: Figures 1 to 4 of any volume

  may a run start?
    data/content.py              the same voxels, whatever the file
    data/examine.py              one volume, read once: what is in it, and what is wrong with it
    data/overlaps.py             the same voxels, or subject, in two places: is that a leak?
    data/fingerprint.py          what the volumes of a list have in common; flags that follow
    data/check_page.py           the page of a check (check.html)
    data/check.py                the command: everything about some lists, and an exit code

  is one better than another?
    study/plan.py                a plan: what is compared, on which labels, with which flags
    study/cells.py               its cells in their order, and the commands of each
    study/lists.py               what its lists have, asked before hours of training
    study/networks.py            and whether its networks can be built
    study/locks.py               one unit of work, one process
    study/times.py               how long steps took, and what is left
    study/runner.py              the cells that are not there yet, after any stop
    study/results.py             what the finished cells say, as numbers
    study/table.py               table, CSV and figure
    study/__main__.py            the command: run, --dry-run, --report

  is this machine right?
    check.py                     gradients of a batch against those of its samples

The loops themselves are train_pretrain.py and train_seg.py, above this folder.
"""
