"""Sources of a conversion: folders, tars and zip archives (both read in place), tables of labels, and Parquet files.

An image's class is the folder that contains it; the folder above may be its split.

    train/n01440764/n01440764_10026.JPEG         in a folder or an archive, below any leading folders
    n01440764/n01440764_10026.JPEG               the split is given by --split, or by the name of the folder above
    ILSVRC2012_img_train.tar                     a tar with a tar for each class
    ILSVRC2012_img_val.tar                       flat; labels come from the devkit
    ILSVRC/Data/CLS-LOC/{train,val,test}/…       Kaggle's ImageNet, its zip or unpacked; labels of the flat val come
                                                 from LOC_val_solution.csv
    ILSVRC2012_val_00000001_n01751748.JPEG       flat; the name ends with the wnid
    imagenet-r/n01443537/art_0.jpg               ImageNet-R, -A and -Sketch: a folder for each wnid
    …-format-val/12/1e2f….jpeg                   ImageNet-V2: a folder for each class NUMBER (or wnid)
    objectnet-1.0/images/alarm_clock/….png       ObjectNet: own names; objectnet-1.0/mappings/ relates them to wnids
    labels.csv                                   a table of paths and labels
    data/train-00000-of-00294.parquet            the Hugging Face hub's sets: images and labels together

listing.py walks over a source and yields paths and the places of their bytes. One module for each kind of set labels
the images; files.py has the result that all of them return. Links are followed, in archives as well. Nothing is dropped
silently: files that are not used are counted (IgnoredFiles), and images without bytes are listed (absent).
"""
