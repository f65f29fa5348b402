"""Where images come from when they are converted: folder trees, tars and zip archives, the latter two read in place.

A labelled image is found by its folder: the folder that holds it is its class, the folder above may be its split.

    train/n01440764/n01440764_10026.JPEG         in a folder or an archive, leading folders are fine
    n01440764/n01440764_10026.JPEG               the split is then named by --split, or by the folder's own name
    ILSVRC2012_img_train.tar                     a tar of one tar a class
    ILSVRC2012_img_val.tar                       flat; labels come from the devkit
    ILSVRC/Data/CLS-LOC/{train,val,test}/…       Kaggle's ImageNet, its zip or unpacked; labels of the flat val come
                                                 from LOC_val_solution.csv
    ILSVRC2012_val_00000001_n01751748.JPEG       flat; the name ends with the class
    imagenet-r/n01443537/art_0.jpg               ImageNet-R, -A and -Sketch: a folder a wnid
    …-format-val/12/1e2f….jpeg                   ImageNet-V2: a folder a class NUMBER (or a wnid)
    objectnet-1.0/images/alarm_clock/….png       ObjectNet: names of its own, which objectnet-1.0/mappings/ explains
    labels.csv                                   a table of paths and labels
    data/train-00000-of-00294.parquet            the Hugging Face hub's sets: images and labels in one (parquet.py)

listing.py walks over a source and gives paths and where their bytes are (blobs.py); a module a kind of set says what
the paths mean (files.py has what they have in common). Links are followed, in archives too. What is not used is counted
by reason and ending (StaysOut), and images that have no bytes are kept apart (Absent): the conversion lists both.
"""
