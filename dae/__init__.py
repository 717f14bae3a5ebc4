"""Disruptive Autoencoders (Valanarasu et al., MIDL 2024) in plain PyTorch. Read the files in this order; each imports
only what stands above it.

    config.py                 a frozen dataclass in, a command line out; presets; JSON
    config_seg.py             the command lines of segmentation, and their recipes

  what is learned (torch, einops, timm only)
    model/conv.py             residual convolutions and instance norm
    model/swin.py             windows, shift mask, position bias, attention, patch merging, the encoder
    model/unetr.py            Swin UNETR in three visible stages: tokenize, encode, decode
    model/unet.py             a port: a residual U-Net, convolutions alone
    model/vit.py              a port: UNETR on timm's transformer blocks
    model/__init__.py         BACKBONES: name -> class, and what a backbone must offer

  what it is learned from
    pretext/disrupt.py        eq. 1 noise, eq. 2 downsampling, local masking, token masking
    pretext/contrast.py       eq. 3-4: cross-modal contrastive learning
    pretext/methods.py        METHODS: one function per row of Table 5; start here if you know the paper

  what it sees
    data/nifti.py             read and write volumes; what is wrong with a file
    data/listfile.py          a JSON file that a person wrote; keys that are almost ours
    data/nnunet.py            an nnU-Net raw folder as the content of a list
    data/datalist.py          data lists, folds, what is held out
    data/leaks.py             who was trained on; nobody is on both sides of a split
    data/sides.py             left and right in the names of classes, and the flips that are safe for them
    data/preprocess.py        spacing, intensity, foreground; one recipe per run
    data/cache.py             each volume prepared once, memory-mapped, shared by all ranks
    data/augment.py           crops and augmentations
    data/batches.py           index-addressed batches: (seed, step, j) -> sample
    data/anatomy.py           a torso and a head as tables of ellipsoids
    data/phantom.py           synthetic CT and MR bodies made from them

  how it is run
    training/distributed.py   ranks, the stop signal; works unlaunched
    training/schedule.py      optimiser groups, warm-up cosine
    training/dice.py          the losses of fine-tuning
    training/transfer.py      pre-trained weights into a network with a new head
    training/precision.py     bf16, fp16 or neither
    training/kernels.py       layout, kernel search and TF32 of each device
    training/checkpoint.py    all of a run in one file that is whole or refused
    training/log.py           log.jsonl, the progress line, sentences
    training/figures.py       the reconstruction sheet, the loss curve
    training/validation.py    reconstruction of fixed crops

  how good it is
    evaluation/metrics.py     Dice, HD, HD95, MSD, NSD of all classes at once, in mm
    evaluation/written.py     what eval.py wrote into a folder, and what it may write there
    evaluation/scoring.py     predictions against labels, file by file
    evaluation/inference.py   sliding window, flips, ensembles, back to the original grid
    evaluation/validation.py  Dice over whole volumes, while training
    evaluation/postprocess.py components, holes, smoothing; chosen on validation cases
    evaluation/statistics.py  paired tests, bootstrap intervals, fold tables
    evaluation/report.py      CSV, JSON, figures, one HTML page

  other people's weights in, MONAI's layout out
    weights/layouts.py        names of tensors in each kind of file, and what it was trained with
    weights/files.py          any file of weights: its tensors by our names, and its plan
    weights/__main__.py       the command: inspect, convert

  is this machine right?
    check.py                  gradients of a batch against those of its samples, on whatever device is there

The loops themselves are train_pretrain.py and train_seg.py, above this folder.
"""
